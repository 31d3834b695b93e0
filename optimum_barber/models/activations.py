"""Calibration activations: on the device, in host memory, or in a memory-mapped file, a few on the device at once."""

import logging
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base import devices
from ..base.errors import UnfinishedError
from ..base.files import write_all
from ..base.ranks import Share
from ..tensors.masks import raw_bytes

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Sample = Tensor | tuple[Tensor, ...]
ALIGNMENT = 64  # bytes, as torch aligns memory: sums may depend on it


class Transfer:
    """A sample on its way to a device (None to leave it where it is), beside the work that goes on there."""

    def __init__(self, sample: Sample, device: torch.device | None) -> None:
        self._ready: Any = None  # the event behind the copy
        on_host = tensors_of(sample)[0].device.type == "cpu"
        stream = devices.copy_stream(device) if device is not None and on_host else None
        if stream is None:
            self._sample = sample if device is None else each(sample, partial(Tensor.to, device=device))
            return
        with devices.on_stream(stream):
            self._sample = each(sample, partial(Tensor.to, device=device, non_blocking=True))
            self._ready = stream.record_event()

    def arrived(self) -> Any:
        """Return the sample on the device: the device's next work waits for it, the host does not."""
        if self._ready is not None:
            for tensor in tensors_of(self._sample):
                devices.wait_for(self._ready, tensor)
        return self._sample


def tensors_of(sample: Sample) -> tuple[Tensor, ...]:
    """Return the tensors of a sample, one or several."""
    return sample if isinstance(sample, tuple) else (sample,)


def each(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    """Return the sample with every tensor changed."""
    return tuple(map(change, sample)) if isinstance(sample, tuple) else change(sample)


def _to_host(sample: Tensor) -> Tensor:
    if devices.copy_stream(sample.device) is None:
        return sample.cpu()
    # pinned, so that the device works while the sample comes back
    return torch.empty_like(sample, device="cpu", pin_memory=True).copy_(sample)


class Activations:
    """A tensor, or a tuple of tensors, a sample, in the order of the samples: all of them, or the share of this rank.

    Every sample is computed on its own, so where samples lie and how many are copied ahead never changes a result.

    Args:
        samples: the tensors, consumed one by one.
        batch_size: how many are on the device at once; None for all, or for one at a time from a file.
        folder: of a file without a name that holds them, and goes when they do; None for memory.
        share: which samples these are; None for all.

    Attributes:
        held: the samples as they are held, which need not be on the device.
    """

    def __init__(
        self,
        samples: Iterable[Sample],
        batch_size: int | None = None,
        folder: str | Path | None = None,
        share: Share | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.folder = folder
        self.share = share
        self.device: torch.device | None = None
        placed = map(self._placed, samples)
        self.held: list[Any] = list(_mapped(placed, folder) if folder else placed)

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples on the device, the next ones on their way there while one is worked on."""
        transfers = (Transfer(sample, self.device) for sample in self.held)
        ahead = deque(islice(transfers, self.together))
        while ahead:
            yield ahead.popleft().arrived()
            ahead.extend(islice(transfers, 1))

    @property
    def together(self) -> int:
        """How many samples are on the device at once, with the one that is worked on."""
        if self.batch_size or self.folder:
            return self.batch_size or 1
        return max(len(self), 1)

    def keep_together(self, batch_size: int) -> None:
        """Have no more than so many samples on the device at once from now on."""
        self.batch_size = batch_size
        self.held = [each(sample, _to_host) for sample in self.held]

    def every(self, stride: int) -> "Activations":
        """Return every stride-th of all samples, those of this rank, sharing memory."""
        first = -self.share.first % stride if self.share else 0
        subset = self.like(())
        subset.device, subset.held = self.device, self.held[first::stride]
        return subset

    def some(self, indices: Sequence[int]) -> "Activations":
        """Return some of all samples by their ascending indices, those of this rank, sharing memory."""
        share = self.share or Share(0, len(self), len(self))
        own = [index for index in indices if share.first <= index < share.end]
        before = sum(index < share.first for index in indices)
        subset = self.like(())
        subset.device, subset.held = self.device, [self.held[index - share.first] for index in own]
        subset.share = Share(before, before + len(own), len(indices))
        return subset

    def like(self, samples: Iterable[Sample]) -> "Activations":
        """Hold other samples where these are."""
        return Activations(samples, self.batch_size, self.folder, self.share)

    @property
    def total(self) -> int:
        """The number of samples of all ranks."""
        return self.share.total if self.share else len(self)

    def _placed(self, sample: Sample) -> Sample:
        self.device = tensors_of(sample)[0].device
        if self.batch_size is None and self.folder is None:
            return sample
        return each(sample, _to_host)


def _mapped(samples: Iterable[Sample], folder: str | Path) -> Iterator[Sample]:
    """Write the samples to one file without a name, then map them from it, aligned as in memory."""
    places: list[Sample] = []  # the samples on the meta device: dtypes and shapes
    size = 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for sample in samples:
            places.append(each(sample, partial(Tensor.to, device="meta")))
            for tensor in tensors_of(sample):
                write_all(file.fileno(), raw_bytes(tensor), size)
                size = _aligned(size + tensor.nbytes)
        os.ftruncate(file.fileno(), size)
        content = mmap.mmap(file.fileno(), 0) if places else b""
    position = 0

    def read(place: Tensor) -> Tensor:
        nonlocal position
        tensor = torch.frombuffer(content, dtype=place.dtype, count=place.numel(), offset=position)
        position = _aligned(position + place.nbytes)
        return tensor.reshape(place.shape)

    for place in places:
        yield each(place, read)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def retry_with_fewer_samples(
    name: str, work: Callable[[], Result], inputs: Sequence[Activations], alone: bool
) -> Result:
    """Run `work()`, which reads `inputs`; out of memory, again with half as many samples on the device at once.

    How many are there never changes a result. `work` must leave nothing behind when it fails.

    Raises:
        UnfinishedError: one sample at once is too many already, or not `alone`: other ranks would wait.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        together = max(samples.together for samples in inputs)
        if together == 1 or not alone:
            advice = "no smaller batch is left" if together == 1 else "give a smaller --batch-size"
            fullness = f"out of memory with {together} of the samples on the device at once"
            raise UnfinishedError(f"{name}: {fullness}, {advice}: {reason}")
        for samples in inputs:
            samples.keep_together(together // 2)
        devices.empty_cache()
        logger.warning("%s: out of memory with %d of the samples there; now %d", name, together, together // 2)
