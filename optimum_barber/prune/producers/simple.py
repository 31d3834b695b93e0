"""Producers of one line: magnitude, random masks, Wanda."""

import hashlib

import torch
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


@producer("random")
def random(linear: LinearInput) -> Tensor:
    """Keep weights at random in each output row; the seed and the Linear's name decide which."""
    digest = hashlib.sha256(f"{linear.seed}:{linear.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    scores = torch.rand(linear.weight.shape, generator=generator)
    return keep_highest(scores, linear.pattern).to(linear.weight.device)


@producer("wanda", needs=["input_norm"])
def wanda(linear: LinearInput) -> Tensor:
    """Keep the weights of largest |W_ij| * ||X_j||_2 in each output row (arXiv 2306.11695)."""
    assert linear.statistics.input_norm is not None
    return keep_highest(linear.weight.abs() * linear.statistics.input_norm, linear.pattern)
