"""Calibration activations: on the device, in host memory, or in a memory-mapped file, a few on the device at once."""

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..base.files import write_all
from ..base.ranks import Share
from ..tensors.bits import raw
from .transfer import Transfer, to_host

ALIGNMENT = 64  # bytes


class Activations:
    """One tensor a sample, in the order of the samples: all of them, or the share of this rank.

    Every sample is computed on its own, so where samples lie and how many travel together never changes
    a result.

    Args:
        samples: the tensors, consumed one by one.
        batch_size: how many are on the device at once; None to keep all there, or one of a file.
        folder: where a file without a name holds them, which goes when they do; None for memory.
        share: which samples these are; None for all.
    """

    def __init__(
        self,
        samples: Iterable[Tensor],
        batch_size: int | None = None,
        folder: str | Path | None = None,
        share: Share | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.folder = folder
        self.share = share
        self.device: torch.device | None = None
        self._samples: list[Tensor] = []
        if folder is None:
            self._samples.extend(self._placed(sample) for sample in samples)
        else:
            self._samples.extend(_mapped(map(self._placed, samples), folder))

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Tensor]:
        """The samples on the device, the next ones on their way there while one is worked on."""
        coming = (Transfer(sample, self.device) for sample in self._samples)
        ahead = deque(islice(coming, self.together))
        while ahead:
            yield ahead.popleft().arrived()
            ahead.extend(islice(coming, 1))

    @property
    def together(self) -> int:
        """How many samples are on the device at once, the one that is worked on among them."""
        return self.batch_size or (1 if self.folder else max(len(self), 1))

    def keep_together(self, batch_size: int) -> None:
        """From now on have no more than so many samples on the device at once."""
        self.batch_size = batch_size
        self._samples = [to_host(sample) for sample in self._samples]

    def every(self, stride: int) -> "Activations":
        """Every stride-th of all samples, as far as they are here, sharing memory."""
        some = self.like(())
        first = -self.share.first % stride if self.share else 0
        some.device, some._samples = self.device, self._samples[first::stride]
        return some

    def like(self, samples: Iterable[Tensor]) -> "Activations":
        """Other samples, held where these are."""
        return Activations(samples, self.batch_size, self.folder, self.share)

    @property
    def total(self) -> int:
        """How many samples all ranks have together."""
        return self.share.total if self.share else len(self)

    @property
    def held(self) -> list[Tensor]:
        """The samples where they lie, which need not be the device."""
        return self._samples

    def _placed(self, sample: Tensor) -> Tensor:
        self.device = sample.device
        return sample if self.batch_size is None and self.folder is None else to_host(sample)


def _mapped(samples: Iterable[Tensor], folder: str | Path) -> Iterator[Tensor]:
    """The samples written to one file without a name, then mapped from it, aligned as memory would be."""
    shapes: list[tuple[torch.dtype, torch.Size]] = []
    size = 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for sample in samples:
            shapes.append((sample.dtype, sample.shape))
            write_all(file.fileno(), raw(sample), size)
            size = aligned(size + sample.nbytes)
        os.ftruncate(file.fileno(), size)
        held = mmap.mmap(file.fileno(), 0) if shapes else b""
    position = 0
    for dtype, shape in shapes:
        yield torch.frombuffer(held, dtype=dtype, count=shape.numel(), offset=position).reshape(shape)
        position = aligned(position + shape.numel() * dtype.itemsize)


def aligned(size: int) -> int:
    """The next multiple of what torch aligns memory to: sums may depend on it."""
    return -(-size // ALIGNMENT) * ALIGNMENT
