"""The store on disk: a decoder layer is read, worked on, committed to the output, and let go."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import BarberError
from ...base.memory import WEIGHT_SIZED, keep_few_kernels, return_freed_buffers, trim
from ...checkpoints.gguf import GgufWeights
from ...checkpoints.safetensors import SafetensorsWeights
from ...checkpoints.shards import Entry
from ...models.activations import Activations, Sample, each
from ...models.architectures import decoder_path
from ...models.loading import ModelReference, brief, empty_model, load_config, load_generation_config
from ...models.source import ModelSource
from ...tensors.masks import PackedMask
from .progress import Progress

LEAST_RETURNED = 2**17  # bytes; glibc's own threshold
StoredWeights = SafetensorsWeights | GgufWeights


@dataclass
class DiskCheckpoint:
    """A checkpoint whose files are open and of which no weight has been read."""

    weights: StoredWeights
    model: Any  # without weights, in the dtype of the result
    obstacle: str | None  # reason why its layers cannot be read one by one; None where they can

    @classmethod
    def open(cls, reference: ModelReference, dtype: str = "auto") -> "DiskCheckpoint":
        """Open the files; `auto` keeps their dtype, float16 for GGUF. Raises BarberError if one is damaged or unfit."""
        opener: type[StoredWeights] = GgufWeights if reference.gguf_file else SafetensorsWeights
        weights = opener.open(reference)
        return_freed_buffers(LEAST_RETURNED)  # every weight is made and dropped again: it must leave no hole
        model = model_without_weights(reference, weights, dtype)
        return_freed_buffers()
        return cls(weights, model, streaming_obstacle(model, weights))

    @property
    def written(self) -> dict[str, Entry]:
        """Dtype and shape of every tensor of the output; tensors that the model does not know stay as they are."""
        entries = dict(self.weights.entries)
        for name, empty in self.model.state_dict().items():
            for stored, part in self.weights.tensors_of(name, empty).items():
                if stored in entries:
                    entries[stored] = Entry(part.dtype, tuple(part.shape))
        return entries


def model_without_weights(reference: ModelReference, weights: StoredWeights, dtype: str = "auto") -> Any:
    """Build the causal LM and name the stored weights as loading would; raises BarberError if they do not fit."""
    config = load_config(reference)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > weights.count:
        held = f"its files hold {weights.count} tensors"
        raise BarberError(f"model {reference.name!r}: its configuration says {layers} layers, {held}")
    try:
        if dtype == "auto":
            chosen = getattr(config, "dtype", None) or weights.dtype
        else:
            chosen = getattr(torch, dtype)
        model = empty_model(config, dtype=chosen)
        _keep_dtypes(model, chosen)
        if reference.gguf_file is None and model.can_generate():
            model.generation_config = load_generation_config(reference)
        weights.match_names(model)
    except Exception as error:  # whatever transformers raises on a bad configuration
        raise BarberError(f"model {reference.name!r} cannot be loaded: {brief(error)}") from None
    return model


def _keep_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Give weights that the model keeps in another dtype that one, as loading would."""
    for pattern, other in model._get_dtype_plan(dtype).items():
        part = re.compile(rf"(^|\.){re.escape(pattern)}(\.|$)")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if part.search(name):
                tensor.data = tensor.data.to(other)


def streaming_obstacle(model: nn.Module, weights: StoredWeights) -> str | None:
    """The reason why layers cannot be read one by one; raises BarberError if a shape is not the configuration's."""
    if weights.obstacle:
        return weights.obstacle
    state, entries = model.state_dict(), weights.entries
    once = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()  # of tied weights the first
    for parameter, empty in sorted(state.items()):
        for name, part in weights.tensors_of(parameter, empty).items():
            if name not in entries and parameter in once:
                return f"its files have no {name}"
            if name in entries and part.ndim == 3 and entries[name].shape == part.mT.shape != part.shape:
                return f"its files have {name} transposed"
            if name in entries:
                _check_entry(f"model {weights.name!r}", name, entries[name], part)
    return None


def _check_entry(model: str, name: str, stored: Entry, tensor: Tensor) -> None:
    """Refuse a stored weight that is not the parameter which the configuration says."""
    if tensor.is_floating_point() and not stored.dtype.is_floating_point:
        raise BarberError(f"{model} is quantized: {name} is stored as {stored.dtype}")
    if stored.shape != tuple(tensor.shape):
        raise BarberError(f"{model}: {name} has shape {stored.shape}, its config says {tuple(tensor.shape)}")


def returned_size(source: ModelSource) -> int:
    """Return the bytes from which freed buffers go back to the system: those of one expert's mask, where there are any.

    The hundreds of small buffers of a layer with experts would leave more and more holes in the heap.
    """
    smallest = WEIGHT_SIZED
    for index in range(len(source)):
        for matrices in source.structure(index).matrices.values():
            for routed in matrices.routed():
                smallest = min([smallest, *(linear.weight.numel() for linear in routed.linears())])
    return max(smallest, LEAST_RETURNED)


class DiskSource(ModelSource):
    """A checkpoint on disk of which one decoder layer is in memory at a time, on `device` in the working dtype.

    Attributes:
        disk: the opened files.
        progress: what layers are committed to; None to read only.
    """

    def __init__(self, checkpoint: DiskCheckpoint, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(checkpoint.model, device, dtype)
        keep_few_kernels()
        return_freed_buffers(returned_size(self))
        self.home = torch.device("cpu")
        self.disk = checkpoint.weights
        self.progress: Progress | None = None

    @property
    def done(self) -> int:
        """As in `ModelSource`."""
        return self.progress.layers if self.progress else 0

    @torch.no_grad()
    def begin(self, windows: Tensor) -> Iterable[Sample]:
        """The hidden states that enter the first layer that is still to be done."""
        self.record(windows)
        if self.progress and self.done:
            return (each(sample, self._working) for sample in self.progress.hidden())
        return self._embedded(windows)

    @contextmanager
    def outer(self) -> Iterator[None]:
        """As in `ModelSource`: embedding and final norm, and what else text calls outside of the decoder (Gemma 3n)."""
        with ExitStack() as stack:
            stack.enter_context(self._loaded(self.model, self._outer_names))
            for name, module in self._encoders:
                load = partial(self._load_called, stack, name)
                stack.callback(module.register_forward_pre_hook(load).remove)
            try:
                yield
            except RuntimeError as error:
                if "meta" not in str(error):
                    raise
                reason = f"model computes with weights that are not read for text: {brief(error)}"
                raise BarberError(f"{reason}; --stream never holds all of them in memory") from None

    def _load_called(self, stack: ExitStack, name: str, module: nn.Module, _: Any) -> None:
        """Load a module's own tensors before its first call, until `stack` ends."""
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            names = {own: f"{name}.{own}" for own in module.state_dict() if "." not in own}
            stack.enter_context(self._loaded(module, names))

    @contextmanager
    def opened(self, index: int) -> Iterator[nn.Module]:
        """Context manager: a layer's module, read from the disk; its tensors are dropped at the end."""
        trim()
        with self._loaded(self.stack[index], self._layer_names(index)):
            if index + 1 < len(self):
                self.disk.read_ahead(self._stored_names(index + 1))
            with super().opened(index) as module:
                yield module

    def commit(self, index: int, masks: dict[str, PackedMask], hidden: Activations) -> dict[str, PackedMask]:
        """Write the layer's weights, its masks and what enters the next one; all is on the disk on return.

        Returns:
            The masks, mapped from their file; none on ranks that do not write.
        """
        if self.progress is None:
            return masks
        state = self.stack[index].state_dict()
        weights: dict[str, Tensor] = {}
        for name, full in self._layer_names(index).items():
            weights |= self.disk.tensors_of(full, state[name])
        return self.progress.commit(masks, hidden, weights)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight from its file, in the file's dtype, tied ones once."""
        for parameter, empty in self.model.state_dict().items():
            for name in self.disk.tensors_of(parameter, empty):
                if name in self.disk.entries:
                    yield name, self.disk.tensor(name)

    def names_outside_layers(self) -> list[str]:
        """The tensors on the disk that no decoder layer holds, among them those that the model does not know."""
        inside: set[str] = set()
        for index in range(len(self)):
            inside.update(self._stored_names(index))
        return [name for name in self.disk.entries if name not in inside]

    def _layer_names(self, index: int) -> dict[str, str]:
        """The full name of each tensor of a layer, by its name within the layer."""
        return {name: f"{self.path}.{index}.{name}" for name in self.stack[index].state_dict()}

    def _stored_names(self, index: int) -> list[str]:
        """The tensors of the files that a layer holds."""
        state = self.stack[index].state_dict()
        names: list[str] = []
        for name, full in self._layer_names(index).items():
            names += self.disk.tensors_of(full, state[name])
        return names

    @cached_property
    def _outer_names(self) -> dict[str, str]:
        """The tensors of the text decoder outside its layers: embedding and final norm.

        With them comes the model's first parameter: some models move what they compute to its device (Idefics 3).
        """
        prefix, inside = decoder_path(self.model), f"{self.path}."
        first, _ = next(self.model.named_parameters())
        names: dict[str, str] = {}
        for name, empty in self.model.state_dict().items():
            outer = name == first or (name.startswith(prefix) and not name.startswith(inside))
            if outer and self.disk.tensors_of(name, empty).keys() <= self.disk.entries.keys():  # else a tied one
                names[name] = name
        return names

    @cached_property
    def _encoders(self) -> list[tuple[str, nn.Module]]:
        """The modules with parameters of their own outside of the text decoder, by name."""
        prefix = decoder_path(self.model)
        modules: list[tuple[str, nn.Module]] = []
        for name, module in self.model.named_modules():
            if name and module._parameters and not f"{name}.".startswith((prefix, f"{self.path}.")):
                modules.append((name, module))
        return modules

    @contextmanager
    def _loaded(self, module: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
        """Context manager: these tensors of the module are mapped from the disk, in the dtype of the model."""
        empty = {name: tensor for name, tensor in module.state_dict().items() if name in names}
        files = self.disk.reopen()  # a mapping of its own, which takes all changes with it
        stored = {name: files.parameter(full, empty[name]).to(empty[name].dtype) for name, full in names.items()}
        module.load_state_dict(stored, strict=False, assign=True)
        del stored, files
        try:
            yield
        finally:
            module.load_state_dict(empty, strict=False, assign=True)
