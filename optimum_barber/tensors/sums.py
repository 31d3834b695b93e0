"""Sums over samples that come out the same in whatever order, by however many ranks. Torch only.

What one sample contributes is rounded to float32; the contributions are added up in float64, which has 29 bits more. So
long as those to one entry lie within a factor of 2^29 / samples of each other, nothing is lost and the sum is exact.
Else its order changes 2^-53 of it, which rounding to float32 all but never (once in 2^28) lets through.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..base.ranks import ALONE, Ranks
from . import native

STRIP = 256  # rows of a product that are worked on at once
PIECE = 2**16  # numbers added at once on the CPU, where torch first copies them to float64


class Sum:
    """The sum of tensors of one shape and dtype, added in any order.

    Args:
        place: the device on which the sum waits; None for that of its parts.
    """

    def __init__(self, place: torch.device | None = None) -> None:
        self.place = place
        self._total: Tensor | None = None
        self._dtype = torch.float32

    def add(self, part: Tensor) -> None:
        """Add what one sample contributes."""
        if self.place is not None:
            part = torch.empty_like(part, device=self.place).copy_(part)
        if self._total is None:
            self._total, self._dtype = torch.zeros_like(part, dtype=torch.float64), part.dtype
        if native.add_to_double(self._total, part):
            return
        rows = len(part)
        if part.device.type == "cpu":
            rows = PIECE * rows // max(part.numel(), 1)
        rows = max(rows, 1)
        for total, piece in zip(self._total.split(rows), part.split(rows), strict=True):
            total.add_(piece)

    def or_zeros(self, like: Tensor) -> "Sum":
        """Return the sum, of zeros where nothing was added: a weight on which nothing depends has no gradient."""
        if self._total is None:
            self.add(torch.zeros_like(like))
        return self

    def over(self, ranks: Ranks = ALONE) -> Tensor:
        """The sum over all ranks, of the dtype of its parts. To be asked for once: its memory is let go."""
        total, self._total = self._added(), None
        return ranks.sum(total).to(self._dtype)

    def value(self) -> Tensor:
        """The sum of this rank, of the dtype of its parts; it goes on."""
        return self._added().to(self._dtype)

    def scale(self, factor: float) -> None:
        """Multiply what was added until now."""
        self._added().mul_(factor)

    def merge(self, ranks: Ranks) -> None:
        """Give every rank the sum over all of them."""
        ranks.sum(self._added())

    def _added(self) -> Tensor:
        if self._total is None:
            raise RuntimeError("nothing was added to a sum")
        return self._total


class Products:
    """The sum of left^T right over samples, a strip of rows after the other.

    Args:
        symmetric: whether left and right are the same (a Gram matrix): strips then begin at the diagonal, which is
            little more than half of the work, of the memory, and of what ranks send.
        place: the device on which the sum waits; None for that of its parts.
    """

    def __init__(self, symmetric: bool = False, place: torch.device | None = None) -> None:
        self.symmetric, self.place = symmetric, place
        self._shape = (0, 0)
        self._sums: list[Sum] = []

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add what one sample contributes, (tokens, rows) and (tokens, columns)."""
        if not self._sums:
            self._shape = left.shape[1], right.shape[1]
            self._sums = [Sum(self.place) for _ in _strips(left.shape[1])]
        for total, strip in zip(self._sums, _strips(left.shape[1]), strict=True):
            columns = right[:, self._first_column(strip) :]
            total.add(left[:, strip].t() @ columns)

    def over(self, ranks: Ranks = ALONE) -> Tensor:
        """The sum over all ranks, (rows, columns). To be asked for once."""
        product: Tensor | None = None
        for total, strip in zip(self._sums, _strips(self._shape[0]), strict=True):
            rows = total.over(ranks)
            if product is None:
                product = rows.new_empty(self._shape)
            product[strip, self._first_column(strip) :] = rows
            if self.symmetric:
                product[strip.stop :, strip] = rows[:, len(rows) :].t()
        if product is None:
            raise RuntimeError("nothing was added to a sum")
        return product

    def _first_column(self, strip: slice) -> int:
        return int(strip.start) if self.symmetric else 0


def _strips(width: int) -> Iterator[slice]:
    return (slice(first, min(first + STRIP, width)) for first in range(0, width, STRIP))
