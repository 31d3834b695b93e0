"""The mask that another tool left in a checkpoint: its zeros, laid over the dense base."""

from functools import cache

import torch
from torch import Tensor

from ..errors import BarberError
from ..masks import keep_highest
from ..patterns import SparsityPattern
from ..weights import CheckpointWeights
from . import LinearInput, Produced, producer

PATTERNS = [(1, 4), (2, 4), (4, 8), (8, 16), (16, 32)]


@cache
def _opened(sparse_model: str) -> CheckpointWeights:
    return CheckpointWeights.open(sparse_model)


def pattern_of_weights(names: list[str], *, sparse_model: str, keep_weights: bool = False) -> SparsityPattern:
    """The tightest usual N:M that every Linear holds, else unstructured with the sparsity of the named Linears."""
    _opened.cache_clear()
    weights = _opened(sparse_model)
    for keep, group in PATTERNS:
        if all(_holds(weights.linear(name), keep, group) for name in names):
            return SparsityPattern(1 - keep / group, keep, group)
    shares = [(int((weights.linear(name) == 0).count_nonzero()), weights.linear(name).numel()) for name in names]
    pruned, total = map(sum, zip(*shares, strict=True))
    if not 0 < pruned < total:
        raise BarberError(f"sparse model {sparse_model!r} has {pruned} zeros in {total} weights: nothing to learn from")
    return SparsityPattern(pruned / total)


def _holds(weight: Tensor, keep: int, group: int) -> bool:
    """At most N of every M are not zero: a kept weight may be zero by chance, as in dequantized models."""
    return weight.shape[1] % group == 0 and int((weight.reshape(-1, group) != 0).sum(1).max()) <= keep


@producer("existing", brings_pattern=pattern_of_weights)
def existing(linear: LinearInput, *, sparse_model: str, keep_weights: bool = False) -> Produced:
    """Keep what is not zero in `sparse_model`; with `keep_weights` also the values that it has there."""
    sparse = _opened(sparse_model).linear(linear.name)
    if sparse.shape != linear.weight.shape:
        got, expected = tuple(sparse.shape), tuple(linear.weight.shape)
        raise BarberError(f"sparse model {sparse_model!r}: {linear.name} has shape {got}, the model's is {expected}")
    sparse, pattern = sparse.to(linear.weight), linear.pattern
    keep = sparse != 0
    if pattern.semi_structured:
        filled = keep_highest(linear.weight.abs().masked_fill(keep, torch.inf), pattern)
        if (keep & ~filled).any():
            raise BarberError(f"sparse model {sparse_model!r}: {linear.name} does not hold the pattern {pattern}")
        keep = filled
    return Produced(keep, sparse if keep_weights else None)
