"""Wanda (arXiv 2306.11695) for units, as LLM-BIP's paper compares with it."""

from torch import Tensor

from .base import UnitInput, scorer


@scorer("wanda", needs=["input_norm"])
def wanda(inputs: UnitInput) -> Tensor:
    """Sum of |W_ji| * ||X_i||_2 over the rows that make a unit."""
    scores = {}
    for part in inputs.units.slices:
        if part.axis == 0:
            norm = inputs.statistics[part.linear].input_norm
            assert norm is not None
            scores[part.linear] = inputs.weights[part.linear].abs() * norm
    return inputs.units.sums(scores)
