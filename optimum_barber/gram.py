"""Gram matrices, summed in strips of rows from the diagonal on: little more than half of the products. Torch only."""

from collections.abc import Iterator

from torch import Tensor

STRIP = 256  # rows


def add_gram(total: Tensor | None, x: Tensor) -> Tensor:
    """total + x^T x, in the memory of `total`; what lies left of the strips means nothing until it is mirrored.

    Args:
        total: (width, width); None for zeros.
        x: (tokens, width).
    """
    width = x.shape[1]
    total = x.new_zeros(width, width) if total is None else total
    for strip in _strips(width):
        total[strip, strip.start :].addmm_(x[:, strip].t(), x[:, strip.start :])
    return total


def mirror(gram: Tensor) -> Tensor:
    """The same with its lower part, in place."""
    for strip in _strips(len(gram)):
        gram[strip.stop :, strip] = gram[strip, strip.stop :].t()
    return gram


def entries(width: int) -> int:
    """How many entries of a Gram matrix are computed."""
    return sum((strip.stop - strip.start) * (width - strip.start) for strip in _strips(width))


def _strips(width: int) -> Iterator[slice]:
    return (slice(first, min(first + STRIP, width)) for first in range(0, width, STRIP))
