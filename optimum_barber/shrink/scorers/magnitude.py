"""The sum of |W| over all weights of a unit: needs no text."""

from torch import Tensor

from .base import UnitInput, scorer


@scorer("magnitude", needs_text=False)
def magnitude(inputs: UnitInput) -> Tensor:
    """Sum of |W| over the rows that make a unit and the columns that read it."""
    values = {part.linear: inputs.weights[part.linear].abs() for part in inputs.units.slices}
    return inputs.units.sums(values)
