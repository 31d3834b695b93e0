"""The ranks of a run: processes with a share of the calibration samples each, which agree on everything else.

A single process is the only rank: it has all samples, and every verb gives back what it is given. Torch only.
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
        """For indexing what all samples lie in."""
        return slice(self.first, self.end)


def share_of(total: int, index: int, count: int, tile: int = 1) -> Share:
    """The index-th of `count` shares, which differ by one tile at most."""
    pieces = -(-total // tile)
    first, end = (min(i * pieces // count * tile, total) for i in (index, index + 1))
    return Share(first, end, total)


def tiles(share: Share, tile: int | None) -> list[slice]:
    """The share in slices of `tile` rows; None for a single one."""
    step = tile or max(share.end - share.first, 1)
    return [slice(first, min(first + step, share.end)) for first in range(share.first, share.end, step)]


class Ranks:
    """This process alone.

    Attributes:
        index: of this rank, 0 for the first, which is the only one that writes and speaks.
        count: of all ranks.
        local: how many of them run on this machine.
    """

    index = 0
    count = 1
    local = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.index == 0

    def share(self, total: int, index: int | None = None) -> Share:
        """The samples of this rank (or that of another index), out of `total`."""
        return share_of(total, self.index if index is None else index, self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, in place, added up over the ranks in their order: the same bits everywhere and every time."""
        return tensor

    def gather(self, values: Sequence[float]) -> list[float]:
        """The values of all ranks in their order; how many may differ."""
        return list(values)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, whose shape and dtype the others know; theirs may be overwritten."""
        return tensor

    def spread(self, make: Callable[[slice], Tensor], like: Tensor, tile: int | None = None) -> Tensor:
        """A tensor like `like` of which each rank makes some rows.

        Args:
            make: some rows.
            like: of the tensor's shape, dtype and device.
            tile: rows made at once, the same ones by however many ranks, where the last bits of a row depend on its
                company (products); None for all that a rank makes.
        """
        made = [make(rows) for rows in tiles(Share(0, len(like), len(like)), tile)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def collect(self, samples: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """On the first rank all samples in their order, one at a time on the CPU; the others only send theirs."""
        return iter(samples)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Return when all ranks are here.

        Raises:
            BarberError: this rank was given other settings than the first.
        """

    def wait(self) -> None:
        """Return when all ranks are here, however long it takes."""


ALONE = Ranks()
