"""What a run from disk to disk takes in memory and on disk, and whether the machine has it: arithmetic on sizes."""

from dataclasses import dataclass, replace
from typing import Any

from ...base.errors import BarberError
from ...models.matrices import Matrices
from ...models.measure import experts_per_token
from ...models.source import ModelSource
from ..block_cache import CLOSING_BYTES

GIB = 2**30
FLOAT32 = 4  # bytes of a number in the working dtype
INTERPRETER = 350 * 2**20  # Python, torch and transformers themselves, as measured
LAYER_COPIES = 4  # weights, weights under masks, their squared gradients summed in float64
TRAINED_COPIES = 8  # dense and trained weights, their gradients, Adam's two moments, the best so far and its successor
ACTIVATION_COPIES = 5  # hidden states, block inputs, targets, outputs, candidate outputs
DURABLE_COPIES = 2  # the hidden states before a layer stay until those after it are on the disk
OUTPUT_COPIES = 3  # a Linear's output, its gradient, and the activation function between them
PLACES = ("auto", "memory", "disk")
REMEDIES: dict[str, tuple[str, dict[str, Any]]] = {  # the setting that helps first where a resource is short
    "memory": ("--activations disk", {"place": "disk"}),
    "device memory": ("--batch-size 1", {"batch_size": 1}),
    "disk": ("--activations memory", {"place": "memory"}),
}


@dataclass(frozen=True)
class Needs:
    """Sizes that decide what a run takes; all in bytes unless said otherwise."""

    layer: int  # the largest decoder layer in the working dtype
    gram: int  # the largest Gram matrices of one block that are held at once
    window: int  # the hidden states of one calibration window
    window_outputs: int  # the outputs of all Linears of one block for one window, at most
    windows: int  # number of calibration windows
    checkpoint: int  # the weights and masks that are written
    place: str = "memory"  # where activations wait: memory or disk
    batch_size: int | None = None  # number of windows on the device at once; None for all
    device: bool = False  # True if layers are worked on elsewhere than in the host's memory
    copies: int = LAYER_COPIES  # number of copies of the layer while it is worked on
    ranks: int = 1  # number of processes that share the windows; memory is that of one of them
    largest_outer_tensor: int = 0  # the largest tensor outside of the layers that is copied, not mapped, when read
    window_closing_inputs: int = 0  # the inputs of the Linear that closes a block for one window, at most

    @property
    def windows_per_rank(self) -> int:
        """Number of windows of one rank, at most."""
        return -(-self.windows // self.ranks)

    @property
    def layer_work(self) -> int:
        """Bytes of one layer while it is worked on, without the activations that wait."""
        return self.copies * self.layer + self.gram + OUTPUT_COPIES * self.window_outputs

    @property
    def activation_bytes(self) -> int:
        """Bytes of the calibration activations of one rank."""
        return ACTIVATION_COPIES * self.windows_per_rank * self.window

    @property
    def closing_input_bytes(self) -> int:
        """Bytes of the closing Linear's inputs; 0 where they are not kept."""
        size = self.windows_per_rank * self.window_closing_inputs
        kept = size <= CLOSING_BYTES and self.place == "memory" and self.batch_size is None
        return size if kept else 0

    @property
    def memory(self) -> int:
        """Peak of the host's anonymous memory, in bytes."""
        layer = self.layer if self.device else self.layer_work
        size = INTERPRETER + max(layer, self.largest_outer_tensor)
        all_on_device = self.device and self.batch_size is None
        if self.place == "memory" and not all_on_device:
            size += self.activation_bytes + self.closing_input_bytes
        return size

    @property
    def device_memory(self) -> int:
        """Peak of the device's memory, in bytes; 0 on the CPU."""
        if not self.device:
            return 0
        if self.batch_size is not None:
            together = min(self.batch_size, self.windows_per_rank)
        else:
            together = 1 if self.place == "disk" else self.windows_per_rank
        return self.layer_work + ACTIVATION_COPIES * together * self.window + self.closing_input_bytes

    @property
    def disk(self) -> int:
        """Bytes of the output, of the state of a resumable run, and of activations that wait on the disk, at most."""
        copies = DURABLE_COPIES
        if self.place == "disk":
            copies += ACTIVATION_COPIES
        return self.checkpoint + copies * self.windows * self.window

    def lines(self) -> list[str]:
        """Return one readable line for each resource."""
        processes = "in all" if self.ranks == 1 else f"for each of {self.ranks} ranks"
        lines = [
            f"streaming     {self.memory / GIB:.2f} GiB of memory {processes}, activations in {self.place}, Python and "
            f"torch {INTERPRETER / GIB:.2f}",
            f"disk          {spelled(self.disk)} for the output, its state, and activations that lie there",
        ]
        if self.device:
            lines.append(f"device        {self.device_memory / GIB:.2f} GiB")
        return lines


def spelled(size: int) -> str:
    """Write bytes in GiB, or in MiB where GiB would hide them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def needs_of(
    source: ModelSource, hidden_size: int, windows: int, length: int,
    checkpoint: int, grams: int = 0,
) -> Needs:  # fmt: skip
    """Measure what it takes to prune decoder layers, which may be without weights, over `windows` of `length` tokens.

    The weights as they are written have `checkpoint` bytes; `grams` copies of a block's Gram matrices are held at once.
    """
    layer_size = gram_size = output_width = closing_width = prunable = 0
    for index, layer in enumerate(source.stack):
        layer_size = max(layer_size, sum(parameter.numel() for parameter in layer.parameters()))
        for matrices in source.structure(index).matrices.values():
            inputs = {(getattr(linear, "expert", None), linear.in_features) for linear in matrices.linears.values()}
            for linear in matrices.linears.values():
                prunable += linear.weight.numel()
                if linear.out_features == hidden_size:
                    closing_width = max(closing_width, linear.in_features)
            gram_size = max(gram_size, sum(width**2 for _, width in inputs))
            output_width = max(output_width, computed_width(matrices, source.model.config))
    return Needs(
        layer=FLOAT32 * layer_size,
        gram=FLOAT32 * grams * gram_size,
        window=FLOAT32 * length * hidden_size,
        window_outputs=FLOAT32 * length * output_width,
        window_closing_inputs=FLOAT32 * length * closing_width,
        windows=windows,
        checkpoint=checkpoint + 2 * prunable // 8,  # the masks of each layer, and the mask file
    )


def computed_width(matrices: Matrices, config: Any) -> int:
    """Return the outputs of all Linears of a block for a token, at most; each token is routed to some experts only."""
    width = sum(linear.out_features for linear in matrices.linears.values())
    for routed in matrices.routed():
        of_all = sum(linear.out_features for linear in routed.linears())
        number = min(experts_per_token(config) or len(routed.experts), len(routed.experts))
        width -= of_all - of_all * number // len(routed.experts)
    return width


def with_batch_size(needs: Needs, device_memory: int | None) -> Needs:
    """Set the batch size to what the device has room for, where all windows are too many and none was configured."""
    if device_memory is None or needs.batch_size is not None or needs.device_memory <= device_memory:
        return needs
    room = (device_memory - needs.layer_work) // (ACTIVATION_COPIES * needs.window)
    return replace(needs, batch_size=room) if room > 0 else needs


def with_place(needs: Needs, place: str, memory: int | None) -> Needs:
    """Set where activations wait, for `auto` memory if they fit, else disk; raises BarberError for another place."""
    if place not in PLACES:
        raise BarberError(f"activations {place!r} is not legal: {', '.join(PLACES)}")
    if place == "auto":
        place = "disk" if memory is not None and needs.memory > memory else "memory"
    return replace(needs, place=place)


def check_fit(needs: Needs, memory: int | None, device_memory: int | None, disk: int) -> None:
    """Refuse a run that takes more than these free bytes, None if unknown; the BarberError says what would fit."""
    free = {"memory": memory, "device memory": device_memory, "disk": disk}
    shortage = _shortage(needs, free)
    if shortage is None:
        return
    resource, taken, left = shortage
    setting = _fitting_setting(needs, resource, free)
    advice = f"{setting} would fit" if setting else "no setting would fit"
    raise BarberError(f"{resource}: the run takes {spelled(taken)}, {spelled(left)} are left; {advice}")


def _shortage(needs: Needs, free: dict[str, int | None]) -> tuple[str, int, int] | None:
    taken = {"memory": needs.memory, "device memory": needs.device_memory, "disk": needs.disk}
    for resource, left in free.items():
        if left is not None and taken[resource] > left:
            return resource, taken[resource], left
    return None


def _fitting_setting(needs: Needs, resource: str, free: dict[str, int | None]) -> str | None:
    """The remedy of the resource, else the largest halved number of windows, that fits in everything."""
    flag, change = REMEDIES[resource]
    if _shortage(replace(needs, **change), free) is None:
        return flag
    windows = needs.windows // 2
    while windows:
        if _shortage(replace(needs, windows=windows), free) is None:
            return f"--samples {windows}"
        windows //= 2
    return None
