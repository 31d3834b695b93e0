"""Random masks, the baseline of every comparison."""

import hashlib

import torch
from torch import Tensor

from ...tensors.masks import keep_highest
from .base import LinearInput, producer


@producer("random")
def random(linear: LinearInput) -> Tensor:
    """Keep weights at random in each output row; the seed and the Linear's name decide which."""
    digest = hashlib.sha256(f"{linear.seed}:{linear.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    scores = torch.rand(linear.weight.shape, generator=generator)
    return keep_highest(scores, linear.pattern).to(linear.weight.device)
