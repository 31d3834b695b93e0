"""The mask that another tool left in a checkpoint: its zeros, laid over the dense base."""

from collections.abc import Iterable
from functools import cache

from torch import Tensor

from ..errors import BarberError
from ..masks import holds_pattern
from ..patterns import SparsityPattern
from ..weights import CheckpointWeights
from . import LinearInput, Produced, producer

PATTERNS = [(2, 4), (1, 4), (4, 8), (8, 16), (16, 32)]


@cache
def _opened(sparse_model: str) -> CheckpointWeights:
    return CheckpointWeights.open(sparse_model)


def pattern_of_weights(names: list[str], *, sparse_model: str, keep_weights: bool = False) -> SparsityPattern:
    """N:M where every Linear holds it, else unstructured, with the sparsity of the named Linears."""
    _opened.cache_clear()
    weights = _opened(sparse_model)
    pruned = sum(int((weights.linear(name) == 0).sum()) for name in names)
    total = sum(weights.linear(name).numel() for name in names)
    for keep, group in PATTERNS:
        pattern = SparsityPattern(1 - keep / group, keep, group)
        if _all_hold((weights.linear(name) != 0 for name in names), pattern):
            return pattern
    if not 0 < pruned < total:
        raise BarberError(f"sparse model {sparse_model!r} has {pruned} zeros in {total} weights: nothing to learn from")
    return SparsityPattern(pruned / total)


def _all_hold(masks: Iterable[Tensor], pattern: SparsityPattern) -> bool:
    return all(holds_pattern(keep, pattern) for keep in masks)


@producer("existing", brings_pattern=pattern_of_weights)
def existing(linear: LinearInput, *, sparse_model: str, keep_weights: bool = False) -> Produced:
    """Keep what is not zero in `sparse_model`; with `keep_weights` also the values that it has there."""
    sparse = _opened(sparse_model).linear(linear.name)
    if sparse.shape != linear.weight.shape:
        got, expected = tuple(sparse.shape), tuple(linear.weight.shape)
        raise BarberError(f"sparse model {sparse_model!r}: {linear.name} has shape {got}, the model's is {expected}")
    sparse = sparse.to(linear.weight)
    return Produced(sparse != 0, sparse if keep_weights else None)
