"""Masks that are there already: as zeros of another tool's checkpoint, or in a mask file."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from ...base.errors import BarberError
from ...checkpoints.foreign import ForeignWeights
from ...checkpoints.record import MaskFile
from ...checkpoints.safetensors import SafetensorsWeights
from ...tensors.masks import keep_highest
from ...tensors.patterns import SparsityPattern
from .base import LinearInput, Produced, producer

logger = logging.getLogger(__name__)
PATTERNS = [(n, m) for m in (2, 4, 8, 16, 32) for n in range(1, m)]
_mask_file = cache(MaskFile)
_checkpoint = cache(SafetensorsWeights.open)
CHANCE = 1e-3  # share of weights that may be zero without being pruned, as in dequantized models


@cache
def _sparse_weights(sparse_model: str) -> ForeignWeights:
    return ForeignWeights(SafetensorsWeights.open(sparse_model))


def pattern_of_weights(
    shapes: Mapping[str, tuple[int, ...]], *, sparse_model: str, keep_weights: bool = False
) -> SparsityPattern:
    """The N:M that every Linear holds, else unstructured with the sparsity of all of them together; logged."""
    _sparse_weights.cache_clear()
    weights, transposed = _sparse_weights(sparse_model), getattr(shapes, "transposed", ())
    other = weights.other_expert(_known(shapes))
    if other is not None:
        raise BarberError(f"sparse model {sparse_model!r} has {other}, which the model has not")
    pruned = total = 0
    for name, shape in shapes.items():
        weight = weights.linear(name, name in transposed)
        if tuple(weight.shape) != shape:
            order = -1 if name in transposed else 1
            got, expected = tuple(weight.shape)[::order], shape[::order]
            raise BarberError(f"sparse model {sparse_model!r}: {name} has shape {got}, the model's is {expected}")
        pruned += int((weight == 0).count_nonzero())
        total += weight.numel()
    if not 0 < pruned < total:
        raise BarberError(f"sparse model {sparse_model!r} has {pruned} zeros in {total} weights: nothing to learn from")
    pattern = _pattern(lambda name: weights.linear(name, name in transposed), list(shapes), pruned / total)
    forms = ", ".join(f"{count} as {form}" for form, count in Counter(map(weights.form, shapes)).items())
    logger.warning("sparse model %r: %.4f zeros, pattern %s, Linears: %s", sparse_model, pruned / total, pattern, forms)
    return pattern


def _known(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of all Linears of the model, those that are left dense among them."""
    return set(getattr(shapes, "known", shapes))


def _pattern(weight_of: Callable[[str], Tensor], names: list[str], sparsity: float) -> SparsityPattern:
    for keep, group in PATTERNS:
        likely = 0 <= sparsity - (1 - keep / group) <= CHANCE
        if likely and all(_holds(weight_of(name), keep, group) for name in names):
            return SparsityPattern(1 - keep / group, keep, group)
    return SparsityPattern(sparsity)


def _holds(weight: Tensor, keep: int, group: int) -> bool:
    # at most N of every M: a kept weight may be zero by chance
    return weight.shape[1] % group == 0 and int((weight.reshape(-1, group) != 0).sum(1).max()) <= keep


@producer("existing", brings_pattern=pattern_of_weights)
def existing(linear: LinearInput, *, sparse_model: str, keep_weights: bool = False) -> Produced:
    """Keep what is not zero in `sparse_model`; with `keep_weights` also the values that it has there."""
    sparse = _sparse_weights(sparse_model).linear(linear.name, linear.transposed)
    sparse, pattern = sparse.to(linear.weight), linear.pattern
    keep = sparse != 0
    if pattern.semi_structured:
        filled = keep_highest(linear.weight.abs().masked_fill(keep, torch.inf), pattern)
        if (keep & ~filled).any():
            raise BarberError(f"sparse model {sparse_model!r}: {linear.name} does not hold the pattern {pattern}")
        keep = filled
    return Produced(keep, sparse if keep_weights else None)


def pattern_of_file(shapes: Mapping[str, tuple[int, ...]], *, masks: str, weights: str = "") -> SparsityPattern:
    """The pattern that a mask file states, with the sparsity of the named Linears; their shapes are checked."""
    _mask_file.cache_clear()
    _checkpoint.cache_clear()
    file = _mask_file(masks)
    others = sorted(set(file) - _known(shapes))
    if others and set(shapes) <= set(file):
        raise BarberError(f"mask file {masks} has a mask for {others[0]}, which the model has not")
    chosen = [file[name] for name in shapes]
    for name, mask in zip(shapes, chosen, strict=True):
        if mask.shape != shapes[name]:
            raise BarberError(f"mask file {masks}: {name} has shape {mask.shape}, the model's is {shapes[name]}")
    sparsity = sum(mask.pruned for mask in chosen) / sum(mask.weights for mask in chosen)
    if file.pattern == "unstructured":
        return SparsityPattern(sparsity)
    return SparsityPattern.parse(file.pattern, None)


@producer("masks", brings_pattern=pattern_of_file)
def masks(linear: LinearInput, *, masks: str, weights: str = "") -> Tensor | Produced:
    """Keep what the mask file `masks` keeps; of the checkpoint `weights`, if given, also the kept values."""
    keep = _mask_file(masks)[linear.name].unpack().to(linear.weight.device)
    if not weights:
        return keep
    return Produced(keep, _checkpoint(weights).linear(linear.name, linear.transposed).to(linear.weight))
