"""What one block has measured, under which masks, and which of it may be used again. Torch only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..models.activations import Activations
from .rebuild_settings import RebuildConfig

Masks = dict[str, Tensor]
CLOSING_BYTES = 2**28  # inputs of the closing Linear that take more are not kept


class MaskVersion:
    """Keep masks as they are now: these tensors, not written to since. Holds them in memory."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._tensors = dict(masks)
        self._writes = {name: _writes(keep) for name, keep in masks.items()}

    def matches(self, masks: Mapping[str, Tensor], but: str | None = None) -> bool:
        """True if the masks of all Linears, `but` perhaps one, are these."""
        for name, keep in self._tensors.items():
            if name == but:
                continue
            if masks.get(name) is not keep or _writes(keep) != self._writes[name]:
                return False
        return True


def _writes(keep: Tensor) -> int:
    return 0 if keep.is_inference() else keep._version


class Measurement(NamedTuple):
    """A pass over all samples: E of every sample of all ranks, in their order, and this rank's outputs."""

    masks: MaskVersion
    errors: list[float]
    outputs: Activations


class ClosingInputs(NamedTuple):
    """Inputs of the closing Linear, one tensor a sample: where only its mask changes, it alone runs again."""

    linear: str
    masks: MaskVersion
    samples: list[Tensor]


class KnownGram(NamedTuple):
    """Gram matrix of an input that no mask of the block reaches, and this rank's first sample of that input."""

    first_input: Tensor
    gram: Tensor


@dataclass(frozen=True)
class SharedPass:
    """The pass that a rebuilder starts with, from trial, masks and settings to its initial statistics.

    It measures E(masks) on the way, so the rebuilder before makes it at its last masks.
    """

    measure: Callable[[Any, Masks, RebuildConfig], Any]
    config: RebuildConfig


@dataclass
class BlockCache:
    """Measurements of one block; dropped with its trial.

    Attributes:
        errors: E of every sample, for all masks that a whole pass has measured; until the weights change.
        latest: the latest pass; until the next one, which needs the memory, or until the weights change.
        closing_inputs: for the next pass, if that changes the closing Linear's mask alone.
        closing: the Linear that closes the block, or none; None if nobody has looked.
        grams: by shrinkage and Linear; used while the first sample's input stays the same.
        shared: the wish, the masks and the result of a shared pass; until the next rebuilder takes it.
    """

    errors: list[tuple[MaskVersion, list[float]]] = field(default_factory=list)
    latest: Measurement | None = None
    closing_inputs: ClosingInputs | None = None
    closing: list[str] | None = None
    grams: dict[float, dict[str, KnownGram]] = field(default_factory=dict)
    shared: tuple[SharedPass, MaskVersion, Any] | None = None

    def errors_of(self, masks: Masks) -> list[float] | None:
        """E of every sample under the masks; None if no pass has measured them."""
        for version, errors in self.errors:
            if version.matches(masks):
                return errors
        return None

    def outputs_of(self, masks: Masks) -> Activations | None:
        """The block's outputs, if the latest pass was under these masks."""
        if self.latest is None or not self.latest.masks.matches(masks):
            return None
        return self.latest.outputs

    def record(self, masks: Masks, errors: list[float], outputs: Activations) -> Measurement:
        """Keep the result of a pass."""
        version = MaskVersion(masks)
        if self.errors_of(masks) is None:
            self.errors.append((version, errors))
        self.latest = Measurement(version, errors, outputs)
        return self.latest

    def take_closing_inputs(self, masks: Masks) -> ClosingInputs | None:
        """The kept inputs of the closing Linear if they are the same under the masks; kept no longer."""
        kept, self.closing_inputs = self.closing_inputs, None
        if kept is None or not kept.masks.matches(masks, but=kept.linear):
            return None
        return kept

    def take_shared(self, wish: SharedPass, masks: Masks) -> Any:
        """The initial statistics of a shared pass if it was this one under these masks, else None; kept no longer."""
        kept, self.shared = self.shared, None
        if kept is None or kept[0] != wish or not kept[1].matches(masks):
            return None
        return kept[2]

    def forget_measurements(self) -> None:
        """Drop all that depends on the values of the weights."""
        self.errors, self.latest, self.closing_inputs, self.shared = [], None, None, None


def closing_inputs_fit(linears: Mapping[str, nn.Linear], name: str, inputs: Activations) -> bool:
    """True if the inputs of the closing Linear can be kept: in little memory, on the device, the block's inputs too.

    False where another Linear has the same weight, whose mask would change with it.
    """
    weight = linears[name].weight
    tied = sum(linear.weight is weight for linear in linears.values()) > 1
    tokens = sum(sample.numel() // sample.shape[-1] for sample in inputs.held)
    fits = tokens * weight.shape[1] * weight.element_size() <= CLOSING_BYTES
    return fits and not tied and inputs.batch_size is None and inputs.folder is None
