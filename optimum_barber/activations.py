"""Calibration activations: on the device, or in host memory with a few samples on the device at once."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor


class Activations:
    """One tensor a sample, in the order of the samples.

    Every sample is computed on its own, so where samples lie and how many travel together never changes
    a result.

    Args:
        samples: the tensors, consumed one by one.
        batch_size: how many are on the device at once; None to keep all there.
    """

    def __init__(self, samples: Iterable[Tensor], batch_size: int | None = None) -> None:
        self.batch_size = batch_size
        self.device: torch.device | None = None
        self._samples: list[Tensor] = []
        for sample in samples:
            self.device = sample.device
            self._samples.append(sample if batch_size is None else sample.cpu())

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Tensor]:
        waiting = iter(self._samples)
        while batch := list(islice(waiting, self.batch_size or len(self) or 1)):
            yield from [sample.to(self.device, non_blocking=True) for sample in batch]

    def every(self, stride: int) -> "Activations":
        """Every stride-th sample, sharing memory."""
        some = Activations((), self.batch_size)
        some.device, some._samples = self.device, self._samples[::stride]
        return some
