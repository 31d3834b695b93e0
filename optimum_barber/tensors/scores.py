"""Importance of weights from weights and gradients (LLM-Barber, arXiv 2408.10631). Torch only."""

import torch
from torch import Tensor

from ..base.ranks import ALONE, Ranks
from .sums import Sum


class GradientReduction:
    """Reduces the gradients g_s of the samples s to one G >= 0 of the same shape.

    `rms`: G = sqrt(mean_s g_s^2) (published code). `mean`: G = |mean_s g_s| (paper, Eq. 8).
    """

    def __init__(self, reduction: str) -> None:
        self.squared = reduction == "rms"
        self.total = Sum()
        self.samples = 0

    def add(self, gradient: Tensor) -> None:
        """Add one sample's gradient; it may be overwritten."""
        self.samples += 1
        self.total.add(gradient.square_() if self.squared else gradient)

    def result(self, weight: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """G of a weight over the samples of all ranks; to be asked for once."""
        samples = int(sum(ranks.gather([self.samples])))
        mean = self.total.or_zeros(weight).over(ranks).div_(max(samples, 1))
        return mean.sqrt_() if self.squared else mean.abs_()


def importance(weight: Tensor, gradient: Tensor | None, metric: str = "weight_gradient") -> Tensor:
    """Importance S of each weight, (out, in), >= 0: |W| * G (Eq. 8), |W| or G (Table VI).

    W is dense, also where it is pruned. G >= 0, the reduced gradient, is overwritten; None for the metric `weight`.
    """
    if metric == "weight" or gradient is None:
        return weight.abs()
    if metric == "gradient":
        return gradient
    return gradient.mul_(weight).abs_()


def finite(tensors: list[Tensor]) -> bool:
    """Whether no value of any tensor is NaN or infinite."""
    extremes: list[Tensor] = []
    for tensor in tensors:
        extremes += tensor.aminmax()  # NaN where any value is
    return not extremes or bool(torch.stack(extremes).isfinite().all())  # in one transfer from the device
