"""Masks out of a mask file, whoever made it."""

from collections.abc import Mapping
from functools import cache

from torch import Tensor

from ...base.errors import BarberError
from ...checkpoints.record import MaskFile
from ...checkpoints.safetensors import SafetensorsWeights
from ...tensors.patterns import SparsityPattern
from .base import LinearInput, Produced, producer


@cache
def _opened(masks: str) -> MaskFile:
    return MaskFile(masks)


@cache
def _checkpoint(weights: str) -> SafetensorsWeights:
    return SafetensorsWeights.open(weights)


def pattern_of_file(shapes: Mapping[str, tuple[int, ...]], *, masks: str, weights: str = "") -> SparsityPattern:
    """The pattern that a mask file states, with the sparsity of the named Linears; their shapes are checked."""
    _opened.cache_clear()
    _checkpoint.cache_clear()
    file = _opened(masks)
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
    keep = _opened(masks)[linear.name].unpack().to(linear.weight.device)
    if not weights:
        return keep
    return Produced(keep, _checkpoint(weights).linear(linear.name).to(linear.weight))
