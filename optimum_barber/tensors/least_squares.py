"""The best values of the kept weights, mask fixed: least squares row by row, by conjugate gradients. Torch only.

A row of weights v under the keep mask m has the error e(d) = sum over tokens of (t - ((v + d) * m) x)^2. With the Gram
matrix G and the correlation c of the residual at v (see `swaps`), its minimum over the kept weights solves

    G_mm d_m = c_m.

All rows go through the same iterations together: one product with G each. Every iteration lowers every
row's error. What few calibration tokens only seem to say is kept out by shrinking G beforehand (see `quadratics`).
"""

import torch
from torch import Tensor


def solve(values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, iterations: int) -> Tensor:
    """The values after some iterations towards the least-squares solution; pruned positions keep theirs.

    Args:
        values: v, (rows, width) float, under the keep mask m.
        gram: G, (width, width), of the dtype of `values`.
        correlation: c, (rows, width), of the residual at v * m with the input.
        iterations: of preconditioned conjugate gradients, >= 0.
    """
    kept = keep.to(values.dtype)
    scale = kept / gram.diagonal().clamp(min=torch.finfo(values.dtype).tiny)
    step = torch.zeros_like(values)
    residual = correlation * kept
    direction = scale * residual
    power = _dots(residual, direction)
    for _ in range(iterations):
        image = (direction @ gram).mul_(kept)
        length = _ratio(power, _dots(direction, image))
        step.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        scaled = scale * residual
        before, power = power, _dots(residual, scaled)
        direction = direction.mul_(_ratio(power, before)).add_(scaled)
    return values + step


def _dots(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.vecdot(left, right)[:, None]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # 0 where a row has reached its solution and both are 0
    return torch.where(denominator > 0, numerator / denominator, 0.0)
