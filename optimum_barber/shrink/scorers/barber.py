"""LLM-Barber for heads and channels: exchange units while the measured block error falls."""

import torch
from torch import Tensor

from ...tensors.unit_scores import error_matrix, exchange_units
from ..choose import highest
from .base import UnitInput, scorer
from .bip import bip


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
