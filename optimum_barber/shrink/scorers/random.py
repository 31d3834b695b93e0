"""Random scores: the floor of every comparison."""

import hashlib

import torch
from torch import Tensor

from .base import UnitInput, scorer


@scorer("random", needs_text=False)
def random(inputs: UnitInput) -> Tensor:
    """Uniform scores; the seed, the layer and the kind of units decide them."""
    digest = hashlib.sha256(f"{inputs.seed}:{inputs.layer}:{inputs.units.kind}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(inputs.units.count, generator=generator)
