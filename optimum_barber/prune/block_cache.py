"""What one block has measured, under which masks, and which of it may be used again. Torch only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn

from ..models.activations import Activations, tensors_of
from .rebuild_settings import RebuildConfig

Masks = dict[str, Tensor]
CLOSING_BYTES = 2**28  # inputs of the closing Linear that take more are not kept


class MaskVersion:
    """Keep masks as they are now: these tensors, not written to since. Does not hold them in memory."""

    def __init__(self, masks: Masks) -> None:
        self._versions = {name: (ref(keep), _writes(keep)) for name, keep in masks.items()}

    def matches(self, masks: Masks, but: str | None = None) -> bool:
        """True if the masks of all Linears, `but` perhaps one, are these."""
        for name, (keep, writes) in self._versions.items():
            if name == but:
                continue
            mask = masks.get(name)
            if mask is None or mask is not keep() or _writes(mask) != writes:
                return False
        return True


def _writes(keep: Tensor) -> int:
    return 0 if keep.is_inference() else keep._version


class SharedPass(NamedTuple):
    """The pass that a rebuilder starts with, from trial, masks and settings to its initial statistics.

    It measures E(masks) on the way, so the rebuilder before makes it at its last masks.
    """

    measure: Callable[[Any, Masks, RebuildConfig], Any]
    config: RebuildConfig


@dataclass
class BlockCache:
    """Measurements of one block; dropped with its trial.

    Attributes:
        errors: E of every sample of all ranks, for all masks that a whole pass has measured; until the weights change.
        latest: this rank's outputs of the latest pass; until the next one needs the memory, or the weights change.
        closing_inputs: the closing Linear, and its inputs under masks of the others; where its own mask alone changes,
            it alone runs again. For the next pass.
        closing: the Linear that closes the block, or none; None if nobody has looked.
        grams: by shrinkage and Linear, of an input that no mask of the block reaches: this rank's first sample of it,
            and the Gram matrix; used while that sample stays the same.
        shared: the shared pass, its masks and its result; until the next rebuilder takes it.
    """

    errors: list[tuple[MaskVersion, list[float]]] = field(default_factory=list)
    latest: tuple[MaskVersion, Activations] | None = None
    closing_inputs: tuple[str, MaskVersion, list[Tensor]] | None = None
    closing: list[str] | None = None
    grams: dict[float, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    shared: tuple[SharedPass, MaskVersion, Any] | None = None

    def errors_of(self, masks: Masks) -> list[float] | None:
        """E of every sample under the masks; None if no pass has measured them."""
        for version, errors in self.errors:
            if version.matches(masks):
                return errors
        return None

    def take_shared(self, expected: SharedPass, masks: Masks) -> Any:
        """The result of the shared pass if it was the expected one under these masks, else None; kept no longer."""
        shared, self.shared = self.shared, None
        if shared is None or shared[0] != expected or not shared[1].matches(masks):
            return None
        return shared[2]


def closing_inputs_fit(linears: Mapping[str, nn.Linear], name: str, inputs: Activations) -> bool:
    """True if the inputs of the closing Linear can be kept: in little memory, on the device, the block's inputs too.

    False where another Linear has the same weight, whose mask would change with it.
    """
    weight = linears[name].weight
    tied = sum(linear.weight is weight for linear in linears.values()) > 1
    hidden = [tensors_of(sample)[0] for sample in inputs.held]
    tokens = sum(sample.numel() // sample.shape[-1] for sample in hidden)
    fits = tokens * weight.shape[1] * weight.element_size() <= CLOSING_BYTES
    return fits and not tied and inputs.batch_size is None and inputs.folder is None
