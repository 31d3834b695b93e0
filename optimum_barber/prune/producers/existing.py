"""The mask that another tool left in a checkpoint, laid over the dense base."""

import logging
from collections import Counter
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ...base.errors import BarberError
from ...checkpoints.foreign import ForeignWeights
from ...checkpoints.safetensors import SafetensorsWeights
from ...tensors.masks import keep_highest
from ...tensors.patterns import SparsityPattern
from .base import LinearInput, Produced, producer

logger = logging.getLogger(__name__)
PATTERNS = [(n, m) for m in (2, 4, 8, 16, 32) for n in range(1, m)]
CHANCE = 1e-3  # share of weights that may be zero without being pruned, as in dequantized models


@cache
def _opened(sparse_model: str) -> ForeignWeights:
    return ForeignWeights(SafetensorsWeights.open(sparse_model))


def pattern_of_weights(
    shapes: Mapping[str, tuple[int, ...]], *, sparse_model: str, keep_weights: bool = False
) -> SparsityPattern:
    """The N:M that every Linear holds, else unstructured with the sparsity of all of them together; logged."""
    _opened.cache_clear()
    weights = _opened(sparse_model)
    pruned = total = 0
    for name, shape in shapes.items():
        weight = weights.linear(name)
        if tuple(weight.shape) != shape:
            got = tuple(weight.shape)
            raise BarberError(f"sparse model {sparse_model!r}: {name} has shape {got}, the model's is {shape}")
        pruned += int((weight == 0).count_nonzero())
        total += weight.numel()
    if not 0 < pruned < total:
        raise BarberError(f"sparse model {sparse_model!r} has {pruned} zeros in {total} weights: nothing to learn from")
    pattern = _pattern(weights, list(shapes), pruned / total)
    forms = ", ".join(f"{count} as {form}" for form, count in Counter(map(weights.form, shapes)).items())
    logger.warning("sparse model %r: %.4f zeros, pattern %s, Linears: %s", sparse_model, pruned / total, pattern, forms)
    return pattern


def _pattern(weights: ForeignWeights, names: list[str], sparsity: float) -> SparsityPattern:
    for keep, group in PATTERNS:
        likely = 0 <= sparsity - (1 - keep / group) <= CHANCE
        if likely and all(_holds(weights.linear(name), keep, group) for name in names):
            return SparsityPattern(1 - keep / group, keep, group)
    return SparsityPattern(sparsity)


def _holds(weight: Tensor, keep: int, group: int) -> bool:
    """At most N of every M weights are not zero; a kept weight may be zero by chance."""
    return weight.shape[1] % group == 0 and int((weight.reshape(-1, group) != 0).sum(1).max()) <= keep


@producer("existing", brings_pattern=pattern_of_weights)
def existing(linear: LinearInput, *, sparse_model: str, keep_weights: bool = False) -> Produced:
    """Keep what is not zero in `sparse_model`; with `keep_weights` also the values that it has there."""
    sparse = _opened(sparse_model).linear(linear.name)
    sparse, pattern = sparse.to(linear.weight), linear.pattern
    keep = sparse != 0
    if pattern.semi_structured:
        filled = keep_highest(linear.weight.abs().masked_fill(keep, torch.inf), pattern)
        if (keep & ~filled).any():
            raise BarberError(f"sparse model {sparse_model!r}: {linear.name} does not hold the pattern {pattern}")
        keep = filled
    return Produced(keep, sparse if keep_weights else None)
