"""The ranks of a run: processes with a share of the calibration samples each, and the same of everything else.

A single process is the only rank: it has all samples, and every method returns its argument. Torch only.
"""

import json
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from .devices import COLLECTIVES, make_current, number_of
from .errors import BarberError, LostRankError

_WORKS_ALONE = ContextVar("works alone", default=False)
PIECE = 2**23  # values that are summed at once
STUCK = timedelta(minutes=30)  # a rank that computes is never this far behind the others
PATIENCE = timedelta(days=7)  # while the first rank reads back and writes all of a model


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
        """Compute a tensor of the shape, dtype and device of `like`, of which each rank makes some rows.

        `make` computes a slice of rows, `tile` of them at once (None: all of a rank), the same ones for any number of
        ranks, where the last bits of a row depend on the rows beside it (products).
        """
        parts = [make(rows) for rows in tiles(Share(0, len(like), len(like)), tile)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def collect(self, samples: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """Yield all samples in their order on the first rank, one at a time on the CPU; the others only send theirs."""
        return iter(samples)

    def tell(self, text: str) -> str:
        """Return the first rank's text; what the others pass does not count."""
        return text

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Wait for all ranks; other settings than the first rank's are a `BarberError`."""

    def wait(self) -> None:
        """Wait for all ranks, however long it takes."""


ALONE = Ranks()


class RankGroup(Ranks):
    """All ranks of the initialised process group, with connections of their own until `close`.

    Tensors go through NCCL where every rank has a GPU for itself (XCCL on xpu), else through gloo and host memory.
    Every verb raises a `LostRankError` when another rank has ended or cannot be reached.

    Attributes:
        open: all groups of this process that have connections.
    """

    open: ClassVar[set["RankGroup"]] = set()

    def __init__(self, device: torch.device) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        with rank_errors(self.index):
            self._group = dist.new_group(backend="gloo", timeout=STUCK)
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._wire = torch.device("cpu")  # where tensors lie when they are sent
        self._tensors = self._group
        hosts = self.gather([zlib.crc32(socket.gethostname().encode())])
        self.local = hosts.count(hosts[self.index])
        backend = COLLECTIVES.get(device.type)
        if backend is not None and len({*zip(hosts, self.gather([number_of(device)]), strict=True)}) == self.count:
            make_current(device)
            self._wire, self._tensors = device, dist.new_group(backend=backend, timeout=STUCK)
        self.open.add(self)

    def share(self, total: int, index: int | None = None) -> Share:
        """See `Ranks.share`; fewer samples than ranks are a `BarberError`."""
        if total < self.count:
            raise BarberError(f"samples {total} are fewer than the {self.count} ranks: give more, or start fewer ranks")
        return super().share(total, index)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the tensor up, in place: each rank sums a part of every piece and sends it to all others."""
        flat = tensor.contiguous().view(-1)
        for piece in flat.split(PIECE):
            piece.copy_(self._summed(piece))
        return tensor if flat.data_ptr() == tensor.data_ptr() else tensor.copy_(flat.view_as(tensor))

    def _summed(self, piece: Tensor) -> Tensor:
        size = -(-len(piece) // self.count)
        mine = torch.zeros(self.count, size, dtype=piece.dtype, device=self._wire)
        mine.view(-1)[: len(piece)] = piece
        theirs = torch.empty_like(mine)
        with rank_errors(self.index):
            dist.all_to_all_single(theirs, mine, group=self._tensors)
        total = theirs[0]
        for part in theirs[1:]:
            total += part
        return torch.stack(self._all(total)).view(-1)[: len(piece)]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        with rank_errors(self.index):
            dist.all_gather(tensors, tensor, group=self._tensors)
        return tensors

    def gather(self, values: Sequence[float]) -> list[float]:
        """Return the values of all ranks in their order; ranks may have different numbers of them."""
        mine = torch.tensor(list(values), dtype=torch.float64, device=self._wire)
        counts = [int(count) for count in self._all(torch.tensor([len(mine)], device=self._wire))]
        padded = torch.nn.functional.pad(mine, (0, max(counts) - len(mine)))
        everyone: list[float] = []
        for part, count in zip(self._all(padded), counts, strict=True):
            everyone += part[:count].tolist()
        return everyone

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor; the others pass one of its shape and dtype, which may be overwritten."""
        sent = tensor.to(self._wire).contiguous()
        with rank_errors(self.index):
            dist.broadcast(_bytes(sent), 0, group=self._tensors)
        return tensor if self.first else sent.to(tensor.device)

    def spread(self, make: Callable[[slice], Tensor], like: Tensor, tile: int | None = None) -> Tensor:
        """Compute a tensor like `like` of which each rank makes some rows, in whole tiles."""
        rows = [share_of(len(like), index, self.count, tile or 1) for index in range(self.count)]
        mine = rows[self.index]
        most = max(share.end - share.first for share in rows)
        sent = torch.zeros(most, *like.shape[1:], dtype=like.dtype, device=self._wire)
        for some in tiles(mine, tile):
            sent[some.start - mine.first : some.stop - mine.first] = make(some)
        parts = []
        for part, share in zip(self._all(_bytes(sent)), rows, strict=True):
            parts.append(part.view(like.dtype)[: share.end - share.first])
        return torch.cat(parts).to(like.device)

    def collect(self, samples: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """Yield all samples in their order on the first rank, one at a time on the CPU; the others only send theirs."""
        if not self.first:
            for sample in samples:
                with rank_errors(self.index):
                    dist.send(sample.cpu().contiguous(), 0, group=self._group)
            return
        yield from samples
        for rank in range(1, self.count):
            share = self.share(total, rank)
            for _ in range(share.first, share.end):
                sample = torch.empty_like(samples[0], device="cpu", memory_format=torch.contiguous_format)
                with rank_errors(self.index):
                    dist.recv(sample, rank, group=self._group)
                yield sample

    def tell(self, text: str) -> str:
        """See `Ranks.tell`."""
        content = text.encode()
        length = int(self.broadcast(torch.tensor([len(content)])))
        sent = self.broadcast(torch.tensor(list(content[:length].ljust(length)), dtype=torch.uint8))
        return bytes(sent.tolist()).decode()

    def agree(self, settings: Mapping[str, Any]) -> None:
        """See `Ranks.agree`."""
        text = json.dumps(settings, default=str)
        mine, theirs = json.loads(text), json.loads(self.tell(text))
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                values = f"{key} {mine.get(key)}, rank 0 {theirs.get(key)}"
                raise BarberError(f"ranks must be given the same: rank {self.index} has {values}")
        self.wait()

    def wait(self) -> None:
        """Wait for all ranks, however long it takes."""
        with rank_errors(self.index):
            dist.barrier(group=self._patient)

    def close(self) -> None:
        """Close the connections: a rank that still waits for this one notices at once."""
        self.open.discard(self)
        groups = {self._tensors, self._group, self._patient}
        del self._tensors, self._group, self._patient
        while groups:
            dist.destroy_process_group(groups.pop())


def _bytes(tensor: Tensor) -> Tensor:  # in a dtype that can be sent
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


@contextmanager
def rank_errors(index: int) -> Iterator[None]:
    """Turn a failed connection into a `LostRankError` of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"\[\S+:\d+\] ", "", " ".join(str(error).split()))[:200]  # without lines of somebody's source
        raise LostRankError(f"rank {index} has lost another one, which has ended or is stuck: {reason}") from None


@contextmanager
def all_ranks(device: torch.device, ranks: Ranks | None = None) -> Iterator[Ranks]:
    """Yield `ranks` if given, else those of the initialised process group, else this process alone."""
    if ranks is not None or not several_ranks():
        yield ranks or ALONE
        return
    group = RankGroup(device)
    try:
        yield group
    finally:
        group.close()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works alone though a process group may be initialised."""
    token = _WORKS_ALONE.set(True)
    try:
        yield
    finally:
        _WORKS_ALONE.reset(token)


def several_ranks() -> bool:
    """True if a process group of more than one process is initialised, and not `alone`."""
    joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return joined and not _WORKS_ALONE.get()
