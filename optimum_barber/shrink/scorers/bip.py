"""LLM-BIP (arXiv 2412.06419): an upper bound on how far the decoder layer's output moves when a unit goes."""

import torch
from torch import Tensor

from ...tensors.unit_scores import influence, summed, through_mlp
from ..units import HEADS
from .base import UnitInput, scorer


@scorer("bip", needs=["input_abs"])
def bip(given: UnitInput, *, norm_gain: bool = False) -> Tensor:
    """Eq. 8 for heads, Eq. 9 for channels; `norm_gain` weighs by the gain of the norm in front of the MLP."""
    reader = given.units.reader
    weight, observed = given.weights[reader], given.statistics[reader].input_abs
    assert observed is not None
    behind = torch.ones_like(weight[:, 0])
    if given.units.kind == HEADS:
        gain = given.gain if norm_gain else None
        behind = through_mlp(given.makers, given.weights[given.structure.down], behind, gain)
    part = given.units.slices[-1]
    return summed(influence(observed, weight, behind), 0, part.start, part.width, given.units.count)
