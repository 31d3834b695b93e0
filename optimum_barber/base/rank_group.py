"""The ranks of an initialised `torch.distributed` process group. Torch only."""

import json
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import BarberError, LostRankError
from .ranks import ALONE, Ranks, Share, share_of, tiles

PIECE = 2**23  # values that are summed at once
STUCK = timedelta(minutes=30)  # a rank that computes is never this far behind the others
PATIENCE = timedelta(days=7)  # while the first rank reads back and writes all of a model


class RankGroup(Ranks):
    """All ranks of the initialised process group, with connections of their own until `close`.

    Tensors go through NCCL where every rank has a GPU for itself, else through gloo and the host's memory.

    Args:
        device: that this rank works on.

    Raises:
        LostRankError: by every verb, when another rank has ended or cannot be reached.
    """

    def __init__(self, device: torch.device) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        with lost(self.index):
            self._group = dist.new_group(backend="gloo", timeout=STUCK)
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._wire = torch.device("cpu")  # where tensors lie when they are sent
        self._tensors = self._group
        hosts = self.gather([zlib.crc32(socket.gethostname().encode())])
        self.local = hosts.count(hosts[self.index])
        if device.type == "cuda":
            gpu = torch.cuda.current_device() if device.index is None else device.index
            if len({*zip(hosts, self.gather([gpu]), strict=True)}) == self.count:
                torch.cuda.set_device(gpu)
                self._wire, self._tensors = device, dist.new_group(backend="nccl", timeout=STUCK)

    def share(self, total: int, index: int | None = None) -> Share:
        """The samples of this rank (or that of another index), out of `total`.

        Raises:
            BarberError: there are fewer samples than ranks.
        """
        if total < self.count:
            raise BarberError(f"samples {total} are fewer than the {self.count} ranks: give more, or start fewer ranks")
        return super().share(total, index)

    def sum(self, tensor: Tensor) -> Tensor:
        """Each rank adds up its part of every piece, and all get all parts: twice the tensor's bytes a rank."""
        flat = tensor.contiguous().view(-1)
        for piece in flat.split(PIECE):
            piece.copy_(self._summed(piece))
        return tensor if flat.data_ptr() == tensor.data_ptr() else tensor.copy_(flat.view_as(tensor))

    def _summed(self, piece: Tensor) -> Tensor:
        size = -(-len(piece) // self.count)
        mine = torch.zeros(self.count, size, dtype=piece.dtype, device=self._wire)
        mine.view(-1)[: len(piece)] = piece
        theirs = torch.empty_like(mine)
        with lost(self.index):
            dist.all_to_all_single(theirs, mine, group=self._tensors)
        total = theirs[0]
        for part in theirs[1:]:
            total += part
        return torch.stack(self._all(total)).view(-1)[: len(piece)]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        with lost(self.index):
            dist.all_gather(found, tensor, group=self._tensors)
        return found

    def gather(self, values: Sequence[float]) -> list[float]:
        """The values of all ranks in their order; how many may differ."""
        mine = torch.tensor(list(values), dtype=torch.float64, device=self._wire)
        counts = [int(count) for count in self._all(torch.tensor([len(mine)], device=self._wire))]
        padded = torch.nn.functional.pad(mine, (0, max(counts) - len(mine)))
        return [v for part, n in zip(self._all(padded), counts, strict=True) for v in part[:n].tolist()]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, whose shape and dtype the others know; theirs may be overwritten."""
        sent = tensor.to(self._wire).contiguous()
        with lost(self.index):
            dist.broadcast(_bytes(sent), 0, group=self._tensors)
        return tensor if self.first else sent.to(tensor.device)

    def spread(self, make: Callable[[slice], Tensor], like: Tensor, tile: int | None = None) -> Tensor:
        """A tensor like `like` of which each rank makes some rows, whole tiles of them."""
        rows = [share_of(len(like), index, self.count, tile or 1) for index in range(self.count)]
        mine, most = rows[self.index], max(r.end - r.first for r in rows)
        sent = torch.zeros(most, *like.shape[1:], dtype=like.dtype, device=self._wire)
        for some in tiles(mine, tile):
            sent[some.start - mine.first : some.stop - mine.first] = make(some)
        parts = zip(self._all(_bytes(sent)), rows, strict=True)
        return torch.cat([part.view(like.dtype)[: r.end - r.first] for part, r in parts]).to(like.device)

    def collect(self, samples: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """On the first rank all samples in their order, one at a time on the CPU; the others only send theirs."""
        if not self.first:
            for sample in samples:
                with lost(self.index):
                    dist.send(sample.cpu().contiguous(), 0, group=self._group)
            return
        yield from samples
        for rank in range(1, self.count):
            share = self.share(total, rank)
            for _ in range(share.first, share.end):
                sample = torch.empty_like(samples[0], device="cpu")
                with lost(self.index):
                    dist.recv(sample, rank, group=self._group)
                yield sample

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Return when all ranks are here.

        Raises:
            BarberError: this rank was given other settings than the first.
        """
        text = json.dumps(settings, default=str).encode()
        length = int(self.broadcast(torch.tensor([len(text)])))
        sent = self.broadcast(torch.tensor(list(text[:length].ljust(length)), dtype=torch.uint8))
        mine, theirs = json.loads(text), json.loads(bytes(sent.tolist()))
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                given = f"{key} {mine.get(key)}, rank 0 {theirs.get(key)}"
                raise BarberError(f"ranks must be given the same: rank {self.index} has {given}")
        self.wait()

    def wait(self) -> None:
        """Return when all ranks are here, however long it takes."""
        with lost(self.index):
            dist.barrier(group=self._patient)

    def close(self) -> None:
        """Let go of the connections: a rank that still waits for this one knows at once."""
        groups = {self._tensors, self._group, self._patient}
        del self._tensors, self._group, self._patient
        while groups:
            dist.destroy_process_group(groups.pop())


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory, in a dtype that can be sent."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


@contextmanager
def lost(index: int) -> Iterator[None]:
    """A failure to talk, told in one line.

    Raises:
        LostRankError: another rank has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"\[\S+:\d+\] ", "", " ".join(str(error).split()))[:200]  # without lines of somebody's source
        raise LostRankError(f"rank {index} has lost another one, which has ended or is stuck: {reason}") from None


@contextmanager
def all_ranks(device: torch.device, ranks: Ranks | None = None) -> Iterator[Ranks]:
    """The ranks of the process group, where one is initialised and no others are given; else this process alone.

    Args:
        device: that this rank works on.
        ranks: to be taken as they are.
    """
    if ranks is not None or not several_ranks():
        yield ranks or ALONE
        return
    group = RankGroup(device)
    try:
        yield group
    finally:
        group.close()


def several_ranks() -> bool:
    """Whether a process group of more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_gpu() -> torch.device:
    """The current GPU; where a launcher has numbered the processes of this machine, that of this one's number.

    Raises:
        BarberError: there are fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise BarberError(
            f"device 'auto' finds no GPU for process {number} of this machine, which has {there}: "
            f"start {there} processes, or give cpu"
        )
    return torch.device("cuda", number)
