"""Masks out of a mask file, whoever made it."""

from functools import cache

from torch import Tensor

from ..artifacts import MaskFile
from ..errors import BarberError
from ..patterns import SparsityPattern
from . import LinearInput, producer


@cache
def _opened(masks: str) -> MaskFile:
    return MaskFile(masks)


def pattern_of_file(names: list[str], *, masks: str) -> SparsityPattern:
    """The pattern that a mask file states, with the sparsity of the named Linears."""
    _opened.cache_clear()
    file = _opened(masks)
    chosen = [file[name] for name in names]
    sparsity = sum(mask.pruned for mask in chosen) / sum(mask.weights for mask in chosen)
    if file.pattern == "unstructured":
        return SparsityPattern(sparsity)
    return SparsityPattern.parse(file.pattern, None)


@producer("masks", brings_pattern=pattern_of_file)
def masks(linear: LinearInput, *, masks: str) -> Tensor:
    """Keep what the mask file `masks` keeps."""
    mask = _opened(masks)[linear.name]
    if mask.shape != tuple(linear.weight.shape):
        expected = tuple(linear.weight.shape)
        raise BarberError(f"mask file {masks}: {linear.name} has shape {mask.shape}, the model's is {expected}")
    return mask.unpack().to(linear.weight.device)
