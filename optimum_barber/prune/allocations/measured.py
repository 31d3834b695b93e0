"""The split with the least predicted error, from errors of every block that were measured before."""

import math
from dataclasses import asdict
from typing import Any

from ...base.errors import BarberError
from ...tensors.budget import ErrorCurve, Shares, least_error
from ..contract import kept_weights
from ..trial import Trial
from .base import Budget, allocation


@allocation("measured")
def measured(budget: Budget, *, spread: float = 0.1, samples: int = 8) -> Shares:
    """Shares by block, from errors e_b of each block b under the producer's masks on the dense stream.

    e_b(s) is measured at the sparsities target - spread, target and target + spread, relative to the residual stream
    behind the block, so that blocks compare, and ln e_b(s) = level_b + slope_b s fitted by least squares. The shares
    minimise sum_b e_b(s_b) subject to sum_b n_b s_b = target * sum_b n_b, n_b the block's weights, and
    |s_b - target| <= spread: see `least_error`. Nothing is extrapolated beyond the spread. The pass costs four forward
    passes over the first `samples` calibration windows.

    Raises:
        BarberError: `spread` or `samples` is not legal, or an error is not finite.
    """
    budget.check_spread("measured", spread)
    if samples < 1:
        raise BarberError(f"samples {samples} of allocation 'measured' is not legal: at least 1")
    lowest, highest = budget.target - spread, budget.target + spread
    basis: dict[str, Any] = {}
    curves: list[ErrorCurve] = []
    for _, block, trial in budget.trials(budget.plan.producer.needs, samples, relative=True):
        points = [_measure(budget, block, trial, sparsity) for sparsity in (lowest, budget.target, highest)]
        curve = ErrorCurve.through(*map(list, zip(*points, strict=True)))
        curves.append(curve)
        basis[block] = {"errors": [list(point) for point in points], **asdict(curve)}
    weights = [budget.weights[block] for block in basis]
    shares = least_error(curves, weights, budget.target, lowest, highest)
    return Shares(dict(zip(basis, shares, strict=True)), basis)


def _measure(budget: Budget, block: str, trial: Trial, sparsity: float) -> tuple[float, float]:
    # the sparsity that the masks reach, and the error under them
    masks = budget.masks(trial, sparsity)
    error = trial.error(masks)
    if not math.isfinite(error):
        raise BarberError(f"allocation 'measured': the error of {block} is {error} at sparsity {sparsity:g}")
    weights = sum(keep.numel() for keep in masks.values())
    return (weights - kept_weights(masks)) / weights, error
