"""What a run from disk to disk will take, and whether the machine has it: arithmetic on sizes, before any work."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...base.errors import BarberError
from ...models.architectures import Architecture, linears_of
from ..block_cache import CLOSING_BYTES

GIB = 2**30
INTERPRETER = 350 * 2**20  # Python, torch and transformers themselves, as measured
LAYER_COPIES = 4  # weights, weights under masks, their squared gradients summed in float64
TRAINED_COPIES = 8  # dense and trained weights, their gradients, Adam's two moments, the best so far and its successor
ACTIVATION_COPIES = 5  # hidden states, block inputs, targets, outputs, candidate outputs
DURABLE_COPIES = 2  # what entered a layer stays until what leaves it is on the disk
SAMPLE_COPIES = 3  # a Linear's output, its gradient, and the function between them
PLACES = ("auto", "memory", "disk")


@dataclass(frozen=True)
class Needs:
    """What a run takes, all in bytes.

    Attributes:
        layer: the largest decoder layer in the working dtype.
        gram: the largest Gram matrices of one block that are there at once.
        sample: one copy of one calibration window's hidden states.
        within: the outputs of one block's Linears for one window.
        samples: how many windows there are.
        checkpoint: what is written of weights and masks.
        place: of the activations: memory or disk.
        batch_size: samples on the device at once; None for all.
        device: whether layers are worked on elsewhere than in the host's memory.
        copies: of the layer, while it is worked on.
        ranks: that share the windows. Memory is that of one of them.
        around: the largest tensor outside of the layers, where reading it is more than mapping it.
        closing: what the Linears that close blocks are given for one window, at most.
    """

    layer: int
    gram: int
    sample: int
    within: int
    samples: int
    checkpoint: int
    place: str = "memory"
    batch_size: int | None = None
    device: bool = False
    copies: int = LAYER_COPIES
    ranks: int = 1
    around: int = 0
    closing: int = 0

    @property
    def share(self) -> int:
        """How many windows one rank has at most."""
        return -(-self.samples // self.ranks)

    @property
    def work(self) -> int:
        """What one layer takes where it is worked on, without the activations that wait."""
        return self.copies * self.layer + self.gram + SAMPLE_COPIES * self.within

    @property
    def waiting(self) -> int:
        """The calibration activations."""
        return ACTIVATION_COPIES * self.share * self.sample

    @property
    def kept(self) -> int:
        """What the closing Linear was given, where all of that may be kept to run it alone."""
        kept = self.share * self.closing
        return kept if kept <= CLOSING_BYTES and self.place == "memory" and self.batch_size is None else 0

    @property
    def memory(self) -> int:
        """Peak of the host's anonymous memory."""
        on_host = self.place == "memory" and not (self.device and self.batch_size is None)
        at_once = max(self.layer if self.device else self.work, self.around)
        return INTERPRETER + at_once + (self.waiting + self.kept if on_host else 0)

    @property
    def device_memory(self) -> int:
        """Peak of the device's memory; 0 on the CPU."""
        if not self.device:
            return 0
        together = self.batch_size or (1 if self.place == "disk" else self.share)
        return self.work + ACTIVATION_COPIES * min(together, self.share) * self.sample + self.kept

    @property
    def disk(self) -> int:
        """What the output, the state that a resumed run needs, and activations on the disk take at most."""
        copies = DURABLE_COPIES + (ACTIVATION_COPIES if self.place == "disk" else 0)
        return self.checkpoint + copies * self.samples * self.sample

    def lines(self) -> list[str]:
        """For people."""
        where = "in all" if self.ranks == 1 else f"for each of {self.ranks} ranks"
        found = [
            f"streaming     {self.memory / GIB:.2f} GiB of memory {where}, activations in {self.place}, Python and "
            f"torch {INTERPRETER / GIB:.2f}",
            f"disk          {spelled(self.disk)} for the output, its state, and activations that lie there",
        ]
        return found + ([f"device        {self.device_memory / GIB:.2f} GiB"] if self.device else [])


def spelled(size: int) -> str:
    """Bytes in GiB, or in MiB where these would hide them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def needs_of(
    stack: nn.ModuleList, architecture: Architecture, hidden_size: int, samples: int, length: int,
    checkpoint: int, grams: int = 0,
) -> Needs:  # fmt: skip
    """What it takes to prune a stack of decoder layers, which may be without weights.

    Args:
        stack: the layers.
        architecture: their blocks.
        hidden_size: width of the hidden states.
        samples: calibration windows.
        length: tokens a window.
        checkpoint: bytes of the weights as they are written.
        grams: how many copies of a block's Gram matrices are there at once.
    """
    blocks = [list(linears_of(layer, m).values()) for layer in stack for m in architecture.blocks.values()]
    prunable = sum(linear.weight.numel() for linears in blocks for linear in linears)
    return Needs(
        layer=4 * max(sum(p.numel() for p in layer.parameters()) for layer in stack),
        gram=4 * grams * max(sum(w * w for w in {linear.in_features for linear in ls}) for ls in blocks),
        sample=4 * length * hidden_size,
        within=4 * length * max(sum(linear.out_features for linear in linears) for linears in blocks),
        closing=4
        * length
        * max((m.in_features for b in blocks for m in b if m.out_features == hidden_size), default=0),
        samples=samples,
        checkpoint=checkpoint + 2 * prunable // 8,  # masks of the layers, and the mask file
    )


def batched(needs: Needs, device_memory: int | None) -> Needs:
    """With as many samples on the device at once as it has room for, where all are too many and none were asked for."""
    if device_memory is None or needs.batch_size is not None or needs.device_memory <= device_memory:
        return needs
    room = (device_memory - needs.work) // (ACTIVATION_COPIES * needs.sample)
    return replace(needs, batch_size=room) if room > 0 else needs


def placed(needs: Needs, place: str, memory: int | None) -> Needs:
    """With activations where they were asked for; `auto` is memory where they fit.

    Raises:
        BarberError: there is no such place.
    """
    if place not in PLACES:
        raise BarberError(f"activations {place!r} is not legal: {', '.join(PLACES)}")
    if place == "auto":
        place = "disk" if memory is not None and needs.memory > memory else "memory"
    return replace(needs, place=place)


def check_fit(needs: Needs, memory: int | None, device_memory: int | None, disk: int) -> None:
    """Refuse a run that cannot fit, with a setting that would.

    Args:
        needs: what it takes.
        memory: bytes that the host has left; None where that is unknown.
        device_memory: that the device has left; None where that is unknown, or there is none.
        disk: that are left where the output goes.

    Raises:
        BarberError: too little of one of them.
    """
    for what, takes, left, settings in (
        ("memory", needs.memory, memory, [("--activations disk", replace(needs, place="disk"))]),
        ("device memory", needs.device_memory, device_memory, [("--batch-size 1", replace(needs, batch_size=1))]),
        ("disk", needs.disk, disk, [("--activations memory", replace(needs, place="memory"))]),
    ):
        if left is None or takes <= left:
            continue
        fewer = ((f"--samples {n}", replace(needs, samples=n)) for n in _halves(needs.samples))
        fitting = next((flag for flag, other in (*settings, *fewer) if _fits(other, memory, device_memory, disk)), None)
        advice = f"{fitting} would fit" if fitting else "no setting would fit"
        raise BarberError(f"{what}: the run takes {spelled(takes)}, {spelled(left)} are left; {advice}")


def _fits(needs: Needs, memory: int | None, device_memory: int | None, disk: int) -> bool:
    pairs = ((needs.memory, memory), (needs.device_memory, device_memory), (needs.disk, disk))
    return all(left is None or takes <= left for takes, left in pairs)


def _halves(samples: int) -> Iterable[int]:
    while samples > 1:
        samples //= 2
        yield samples


def free_memory() -> int | None:
    """Bytes of memory that this process may still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        taken = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        limit = int((group / "memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no group, or one without a limit
        return left
    return min(left, limit - int(taken["anon"]))


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a CUDA device has left; None for any other."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def free_disk(directory: Path) -> int:
    """Bytes that the file system has left where `directory` is, or will be."""
    return shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
