"""Samples between host and device: pinned on the host, copied beside the work, fewer at once where memory runs out."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..base.errors import UnfinishedError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Transfer:
    """A sample on its way to a device, or already there.

    Args:
        sample: where it lies.
        device: where it shall be; None for where it is.
    """

    def __init__(self, sample: Tensor, device: torch.device | None) -> None:
        self._ready: torch.cuda.Event | None = None
        if device is None or device.type != "cuda" or sample.is_cuda:
            self._sample = sample if device is None else sample.to(device)
            return
        stream = _copying(device)
        with torch.cuda.stream(stream):
            self._sample = sample.to(device, non_blocking=True)
            self._ready = stream.record_event()

    def arrived(self) -> Tensor:
        """The sample on the device: the work that follows waits for it, the host does not."""
        if self._ready is not None:
            working = torch.cuda.current_stream(self._sample.device)
            working.wait_event(self._ready)
            self._sample.record_stream(working)
        return self._sample


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which samples come."""
    return torch.cuda.Stream(device)


def to_host(sample: Tensor) -> Tensor:
    """The sample in the host's memory, pinned where it comes from a GPU, so that it goes back beside the work."""
    return torch.empty_like(sample, device="cpu", pin_memory=True).copy_(sample) if sample.is_cuda else sample.cpu()


class Held(Protocol):
    """Samples of which some are on the device at once."""

    @property
    def together(self) -> int: ...  # noqa: D102

    def keep_together(self, batch_size: int) -> None: ...  # noqa: D102


def within_memory(name: str, work: Callable[[], Result], held: Sequence[Held], alone: bool) -> Result:
    """`work()`; where the device's memory does not suffice, again with half as many samples there at once.

    How many are there never changes a result, so work that leaves nothing behind when it fails may be done again.

    Args:
        name: of what is worked on.
        work: to be done.
        held: the samples that it reads.
        alone: whether this process shares the work with no other, which would wait for it.

    Raises:
        UnfinishedError: one sample at once is too many already, or others would wait.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            told = str(error).splitlines()[0]
        together = max(samples.together for samples in held)
        if together == 1 or not alone:
            advice = "no smaller batch is left" if together == 1 else "give a smaller --batch-size"
            fullness = f"out of memory with {together} of the samples on the device at once"
            raise UnfinishedError(f"{name}: {fullness}, {advice}: {told}")
        for samples in held:
            samples.keep_together(together // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("%s: out of memory with %d of the samples there; now %d", name, together, together // 2)
