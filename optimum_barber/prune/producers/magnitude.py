"""Magnitude pruning (Han et al. 2015)."""

from torch import Tensor

from ...base.errors import BarberError
from ...tensors.masks import keep_highest
from .base import LinearInput, producer


@producer("magnitude")
def magnitude(linear: LinearInput, *, scope: str = "layer") -> Tensor:
    """Keep the weights of largest |W| (Han et al. 2015); `scope` of the comparison is layer or row."""
    if scope not in ("layer", "row"):
        raise BarberError(f"scope {scope!r} of producer 'magnitude' is not legal: layer or row")
    return keep_highest(linear.weight.abs(), linear.pattern, scope)
