"""Decoder layers read from the disk one at a time, worked on, written to the output, and let go."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from ...base.errors import BarberError
from ...base.memory import return_freed_buffers, trim
from ...checkpoints.gguf import GgufWeights
from ...checkpoints.stored import SafetensorsWeights, StoredWeights
from ...models.activations import Activations
from ...models.blocks import DecoderLayer
from ...models.loading import ModelReference, brief, load_config
from ...models.source import ModelSource, working_copy
from ...tensors.masks import PackedMask
from .progress import Progress


def stored_weights(reference: ModelReference) -> StoredWeights:
    """Open the files that a reference names; no weight is read.

    Raises:
        BarberError: a file is missing, truncated or damaged.
    """
    return GgufWeights.of(reference) if reference.gguf_file else SafetensorsWeights.of(reference)


def skeleton(reference: ModelReference, weights: StoredWeights, dtype: str = "auto") -> nn.Module:
    """The causal LM of a checkpoint without its weights, in the dtype that loading it would give; names the weights.

    Raises:
        BarberError: its configuration does not fit its weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(reference)
    try:
        chosen = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None) or weights.dtype
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen)
        model.tie_weights()
        if reference.gguf_file is None and (reference.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(reference.directory)
        weights.named_as(model)
    except Exception as error:  # whatever transformers raises on a bad configuration
        raise BarberError(f"model {reference.name!r} cannot be loaded: {brief(error)}") from None
    return model.eval()


def why_whole(model: nn.Module, weights: StoredWeights) -> str | None:
    """Why a checkpoint must be loaded whole to be pruned; None where its layers can be read one by one.

    Raises:
        BarberError: a shape is not what the configuration says.
    """
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return f"{type(model).__name__} keeps some weights in float32"
    if weights.whole:
        return weights.whole
    parameters, entries = dict(model.named_parameters()), weights.entries
    state = model.state_dict()
    tied = state.keys() - parameters.keys() - dict(model.named_buffers()).keys()
    for name, tensor in sorted(state.items()):
        if name not in entries and name not in tied:
            return f"its files have no {name}"
        if name in entries and entries[name].shape != tuple(tensor.shape):
            raise BarberError(
                f"model {weights.name!r}: {name} has shape {entries[name].shape}, its config says {tuple(tensor.shape)}"
            )
    return None


class DiskSource(ModelSource):
    """A checkpoint on disk: one decoder layer in memory at a time, its result written before the next is read.

    Args:
        model: the causal LM without its weights, from `skeleton`.
        weights: its opened files.
        device: where a layer is worked on.
        dtype: working dtype of weights and activations.
    """

    def __init__(
        self, model: nn.Module, weights: StoredWeights, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(model, device, dtype)
        return_freed_buffers()
        self.home = torch.device("cpu")
        self.disk = weights
        self.progress: Progress | None = None

    @torch.no_grad()
    def begin(self, windows: Tensor) -> Iterable[Tensor]:
        """The hidden states that enter the first layer that is still to be done."""
        with self._lent(self.model, self._around), self._lent(self.stack[0], self._within(0)):
            self._record_calls(windows[:1])
        if self.progress is not None and self.progress.layers:
            return (self._working(sample.clone()) for sample in self.progress.hidden())
        return self._embedded(windows)

    def layers(self) -> Iterator[DecoderLayer]:
        """Each layer that is still to be done; written and let go when the next is asked for."""
        for index in range(self.progress.layers if self.progress else 0, len(self)):
            module, name = self.stack[index], f"{self.path}.{index}"
            trim()
            with self._lent(module, self._within(index)):
                self.disk.read_ahead(self._within(index + 1).values() if index + 1 < len(self) else ())
                with working_copy(module, self.device, self.dtype):
                    yield DecoderLayer.build(name, module, self._calls[index], self.architecture)
                if self.progress is not None:
                    self.progress.finish({full: module.state_dict()[n] for n, full in self._within(index).items()})

    def keep(self, masks: dict[str, PackedMask], hidden: Activations) -> dict[str, PackedMask]:
        """The masks, from the file that they are written to."""
        return masks if self.progress is None else self.progress.keep(masks, hidden)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight from its file, in the file's dtype, tied ones once."""
        for name in self.model.state_dict():
            if name in self.disk.entries:
                yield name, self.disk.tensor(name)

    def others(self) -> list[str]:
        """The tensors on the disk that no decoder layer holds, the model's own and those that it does not know."""
        inner = {name for index in range(len(self)) for name in self._within(index).values()}
        return [name for name in self.disk.entries if name not in inner]

    def _embedded(self, windows: Tensor) -> Iterator[Tensor]:
        with self._lent(self.model, self._around):
            yield from super()._embedded(windows)

    def _within(self, index: int) -> dict[str, str]:
        """Names of a layer's tensors in the layer, with those in the checkpoint."""
        return {name: f"{self.path}.{index}.{name}" for name in self.stack[index].state_dict()}

    @cached_property
    def _around(self) -> dict[str, str]:
        """The tensors that the layers are called with: embedding and final norm."""
        base = f"{self.model.base_model_prefix}."
        names = [name for name in self.model.state_dict() if name.startswith(base)]
        return {name: name for name in names if not name.startswith(f"{self.path}.")}

    @contextmanager
    def _lent(self, module: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
        """Inside, these tensors of the module are mapped from the disk, in the dtype of the model."""
        empty = {name: tensor for name, tensor in module.state_dict().items() if name in names}
        opened = self.disk.reopened()  # so that changes go with the mapping
        stored = {name: opened.tensor(full).to(empty[name].dtype) for name, full in names.items()}
        module.load_state_dict(stored, strict=False, assign=True)
        del stored, opened
        try:
            yield
        finally:
            module.load_state_dict(empty, strict=False, assign=True)
