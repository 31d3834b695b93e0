"""The ranks of a run: processes with a share of the calibration samples each, and the same of everything else.

A single process is the only rank: it has all samples, and every method returns its argument. Torch only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Consecutive samples, [first, end), of a total."""

    first: int
    end: int
    total: int

    @property
    def slice(self) -> slice:
        """An index into all samples."""
        return slice(self.first, self.end)


def share_of(total: int, index: int, count: int, tile: int = 1) -> Share:
    """Return the index-th of `count` shares, which differ by one tile at most."""
    pieces = -(-total // tile)
    first = index * pieces // count * tile
    end = (index + 1) * pieces // count * tile
    return Share(min(first, total), min(end, total), total)


def tiles(share: Share, tile: int | None) -> list[slice]:
    """Cut a share into slices of `tile` rows; None for a single one."""
    step = tile or max(share.end - share.first, 1)
    return [slice(first, min(first + step, share.end)) for first in range(share.first, share.end, step)]


class Ranks:
    """This process alone.

    Attributes:
        index: of this rank, 0 for the first, which alone writes files and messages.
        count: number of all ranks.
        local: number of those on this machine.
    """

    index = 0
    count = 1
    local = 1

    @property
    def first(self) -> bool:
        """True for the rank that writes files and messages."""
        return self.index == 0

    def share(self, total: int, index: int | None = None) -> Share:
        """Return the samples of this rank (or that of another index), out of `total`."""
        return share_of(total, self.index if index is None else index, self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the tensor up over the ranks, in place and in their order: the same bits everywhere and every time."""
        return tensor

    def gather(self, values: Sequence[float]) -> list[float]:
        """Return the values of all ranks in their order; ranks may have different numbers of them."""
        return list(values)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor; the others pass one of its shape and dtype, which may be overwritten."""
        return tensor

    def spread(self, make: Callable[[slice], Tensor], like: Tensor, tile: int | None = None) -> Tensor:
        """Compute a tensor of which each rank makes some rows.

        Args:
            make: computes a slice of rows.
            like: a tensor of the result's shape, dtype and device.
            tile: rows computed at once, the same ones for any number of ranks, where the last bits of a row depend on
                the rows beside it (products); None for all rows of a rank.
        """
        parts = [make(rows) for rows in tiles(Share(0, len(like), len(like)), tile)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def collect(self, samples: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """Yield all samples in their order on the first rank, one at a time on the CPU; the others only send theirs."""
        return iter(samples)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Wait for all ranks and compare their settings.

        Raises:
            BarberError: this rank has other settings than the first.
        """

    def wait(self) -> None:
        """Wait for all ranks, however long it takes."""


ALONE = Ranks()
