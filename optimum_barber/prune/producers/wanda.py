"""Wanda (arXiv 2306.11695)."""

from torch import Tensor

from ...tensors.masks import keep_highest
from .base import LinearInput, producer


@producer("wanda", needs=["input_norm"])
def wanda(linear: LinearInput) -> Tensor:
    """Keep the weights of largest |W_ij| * ||X_j||_2 in each output row (arXiv 2306.11695)."""
    assert linear.statistics.input_norm is not None
    return keep_highest(linear.weight.abs() * linear.statistics.input_norm, linear.pattern)
