"""LLM-BIP (arXiv 2412.06419): a bound on how far the layer moves when a unit goes; barber exchanges and measures."""

import torch
from torch import Tensor

from ...tensors.unit_scores import error_matrix, exchange_units, input_importance, mlp_input_importance, unit_sums
from ..choose import highest
from ..units import HEADS
from .base import UnitInput, scorer


@scorer("bip", needs=["input_abs"])
def bip(inputs: UnitInput, *, norm_gain: bool = False) -> Tensor:
    """Eq. 8 for heads, Eq. 9 for channels; `norm_gain` weighs by the gain of the norm in front of the MLP."""
    reader = inputs.units.reader
    weight, input_abs = inputs.weights[reader], inputs.statistics[reader].input_abs
    assert input_abs is not None
    importance = torch.ones_like(weight[:, 0])
    if inputs.units.kind == HEADS:
        gain = inputs.gain if norm_gain else None
        importance = mlp_input_importance(inputs.makers, inputs.weights[inputs.structure.down], importance, gain)
    part = inputs.units.slices[-1]
    influence = input_abs * input_importance(weight, importance)
    return unit_sums(influence, 0, part.start, part.width, inputs.units.count)


@scorer("barber", needs=["input_abs", "gram"])
def barber(inputs: UnitInput) -> Tensor:
    """Begin with LLM-BIP's choice and exchange units while the block's error E falls; those that stay score highest.

    At the dense weights E is at its minimum and its gradient zero, so the gradient is taken where the units that go
    are zero, as LLM-Barber takes it at the sparse weights. E is quadratic in the columns that read the units, so that
    one pass gives gradient and error of every choice exactly.
    """
    units, name = inputs.units, inputs.units.reader
    gram = inputs.statistics[name].gram
    assert gram is not None
    scores = bip(inputs)
    matrix = error_matrix(inputs.weights[name], gram, units.slices[-1].width)
    kept = exchange_units(matrix, highest(scores, units, inputs.keep), units.groups)
    ranked = scores / scores.max().clamp_min(torch.finfo(scores.dtype).tiny)
    ranked[kept] += 2  # theirs are in [2, 3], the others in [0, 1]
    return ranked
