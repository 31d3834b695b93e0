"""The sum of |W| over all weights of a unit: needs no text."""

from torch import Tensor

from .base import UnitInput, scorer


@scorer("magnitude", needs_text=False)
def magnitude(given: UnitInput) -> Tensor:
    """Sum of |W| over the rows that make a unit and the columns that read it."""
    names = {part.linear for part in given.units.slices}
    return given.units.sums({name: given.weights[name].abs() for name in names})
