"""LLM-BIP (arXiv 2412.06419): a bound on how far the layer moves when a unit goes."""

import torch
from torch import Tensor

from ...tensors.unit_scores import input_importance, mlp_input_importance, unit_sums
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
