"""What LLM-BIP's paper compares with: magnitude, Wanda (arXiv 2306.11695) for units, and the floor, random scores."""

import hashlib

import torch
from torch import Tensor

from .base import UnitInput, scorer


@scorer("magnitude", needs_text=False)
def magnitude(inputs: UnitInput) -> Tensor:
    """Sum of |W| over the rows that make a unit and the columns that read it."""
    values = {part.linear: inputs.weights[part.linear].abs() for part in inputs.units.slices}
    return inputs.units.sums(values)


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


@scorer("random", needs_text=False)
def random(inputs: UnitInput) -> Tensor:
    """Uniform scores; the seed, the layer and the kind of units decide them."""
    digest = hashlib.sha256(f"{inputs.seed}:{inputs.layer}:{inputs.units.kind}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(inputs.units.count, generator=generator)
