"""Decoder layers read from safetensors shards one at a time, worked on, written to the output, and let go."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activations
from .blocks import DecoderLayer
from .errors import BarberError
from .loading import ModelReference, brief, load_config
from .masks import PackedMask
from .memory import return_freed_buffers, trim
from .progress import Progress
from .shards import Header, read_header
from .source import ModelSource, working_copy
from .weights import CheckpointWeights

INDEX_NAME = "model.safetensors.index.json"


class DiskWeights(CheckpointWeights):
    """The weights of a checkpoint as mapped files; every header is checked on opening, no weight is read.

    Attributes:
        headers: by file name.
        index: content of the index file; None for a checkpoint of one file.
    """

    headers: dict[str, Header]
    index: dict[str, Any] | None

    @classmethod
    def of(cls, reference: ModelReference) -> "DiskWeights":
        """Open the safetensors files of a local directory or hub snapshot.

        Raises:
            BarberError: there are none, one is missing, truncated or damaged, or the index speaks of others.
        """
        path = reference.directory / INDEX_NAME
        try:
            index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            files = set(index["weight_map"].values()) if index else {"model.safetensors"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BarberError(f"model {reference.name!r}: {INDEX_NAME} is no index: {brief(error)}") from None
        if any(os.path.basename(file) != file for file in files):
            raise BarberError(f"model {reference.name!r}: {INDEX_NAME} names files outside of its directory")
        try:
            headers = {file: read_header(reference.directory / file) for file in sorted(files)}
        except BarberError as error:
            raise BarberError(f"model {reference.name!r}: {error}") from None
        where = index["weight_map"] if index else {n: f for f in headers for n in headers[f].entries}
        for name, file in where.items():
            if name not in headers[file].entries:
                raise BarberError(f"model {reference.name!r}: {file} lacks {name}, which the index says it holds")
        weights = cls({name: reference.directory / file for name, file in where.items()}, reference.name)
        weights.headers, weights.index = headers, index
        return weights

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its header."""
        return self.headers[self.files[name].name].entries[name].shape

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read these tensors while others are worked on."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            header = self.headers[self.files[name].name]
            with self.files[name].open("rb") as file:
                start, size = header.starts[name], header.entries[name].bytes
                os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def first_dtype(weights: DiskWeights) -> torch.dtype:
    """The dtype of the first floating-point tensor, or float32: what transformers takes where no config says it."""
    entries = (entry for header in weights.headers.values() for entry in header.entries.values())
    return next((entry.dtype for entry in entries if entry.dtype.is_floating_point), torch.float32)


def skeleton(reference: ModelReference, weights: DiskWeights, dtype: str = "auto") -> nn.Module:
    """The causal LM of a checkpoint without its weights, in the dtype that loading it would give.

    Raises:
        BarberError: its configuration does not fit its weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(reference)
    try:
        chosen = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None) or first_dtype(weights)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen)
        model.tie_weights()
        if (reference.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(reference.directory)
    except Exception as error:  # whatever transformers raises on a bad configuration
        raise BarberError(f"model {reference.name!r} cannot be loaded: {brief(error)}") from None
    return model.eval()


def why_whole(model: nn.Module, weights: DiskWeights) -> str | None:
    """Why a checkpoint must be loaded whole to be pruned; None where its layers can be read one by one.

    Raises:
        BarberError: a shape is not what the configuration says.
    """
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return f"{type(model).__name__} keeps some weights in float32"
    parameters = dict(model.named_parameters())
    state = model.state_dict()
    tied = state.keys() - parameters.keys() - dict(model.named_buffers()).keys()
    for name, tensor in sorted(state.items()):
        if name not in weights.files and name not in tied:
            return f"its files have no {name}"
        if name in weights.files and weights.shape(name) != tuple(tensor.shape):
            raise BarberError(
                f"model {weights.name!r}: {name} has shape {weights.shape(name)}, its config says {tuple(tensor.shape)}"
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
        self, model: nn.Module, weights: DiskWeights, device: torch.device, dtype: torch.dtype = torch.float32
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
            if name in self.disk.files:
                yield name, self.disk.tensor(name)

    def others(self) -> list[str]:
        """The tensors on the disk that no decoder layer holds, the model's own and those that it does not know."""
        inner = {name for index in range(len(self)) for name in self._within(index).values()}
        return [name for name in self.disk.files if name not in inner]

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
        opened = CheckpointWeights(self.disk.files, self.disk.name)  # anew, so that changes go with the mapping
        stored = {name: opened.tensor(full).to(empty[name].dtype) for name, full in names.items()}
        module.load_state_dict(stored, strict=False, assign=True)
        del stored, opened
        try:
            yield
        finally:
            module.load_state_dict(empty, strict=False, assign=True)
