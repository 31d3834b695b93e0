"""The one opener of safetensors checkpoints: every header is checked, tensors are read when asked for."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from ..base.errors import BarberError
from ..base.fields import one_line
from ..base.files import read_json_object
from ..models.file_names import FileNames
from ..models.loading import ModelReference, resolve_model
from ..models.packed import PARTS, dequantized
from .names import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from .shards import Entry, Header, Layout, read_ahead, read_header


@dataclass
class SafetensorsWeights:
    """The weights of a safetensors checkpoint, mapped from their files."""

    name: str  # of the model, for messages
    directory: Path
    headers: Mapping[str, Header]  # by file
    layout: Layout
    obstacle: str | None = None
    unpacks: bool = False

    def __post_init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        for name, file in self.layout.files.items():
            self.entries[name] = self.headers[file].entries[name]
        self.names = FileNames()
        self._mapped: dict[str, Any] = {}

    @classmethod
    def open(cls, model: str | Path | ModelReference) -> "SafetensorsWeights":
        """Open a model's files as transformers does.

        `model.safetensors` counts before an index. An index says which files there are; all that these hold counts,
        and of a tensor that lies in several of them the last.

        Raises:
            BarberError: there are no such files, one is missing, truncated or damaged, or the index does not fit them.
        """
        reference = resolve_model(model)
        name, directory = reference.name, reference.directory
        try:
            index = None if (directory / WEIGHTS_NAME).is_file() else _read_index(directory)
            stated = index["weight_map"] if index else {}
            headers = {file: read_header(directory / file) for file in sorted({*stated.values()} or {WEIGHTS_NAME})}
        except BarberError as error:
            raise BarberError(f"model {name!r}: {error}") from None
        files = _files_of(name, stated, headers)
        metadata = {file: header.metadata for file, header in headers.items()}
        return cls(name, directory, headers, Layout(files, metadata, index and {**index, "weight_map": files}))

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating-point tensor, or float32: what transformers takes where no config says it."""
        for header in self.headers.values():
            for entry in header.entries.values():
                if entry.dtype.is_floating_point:
                    return entry.dtype
        return torch.float32

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return len(self.entries)

    def match_names(self, model: nn.Module) -> None:
        """Learn how the model's parameters are named and cut in files such as these."""
        self.names = FileNames.of(model)
        for name in sorted(self.names.obstacles)[:1]:
            self.obstacle = f"its files have {name} in another order of rows"

    def parameter(self, name: str, empty: Tensor) -> Tensor:
        """A parameter of the model by its own name; `empty` has its shape."""
        return self.names.parameter_of(name, empty, self.tensor)

    def tensors_of(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of the files that a parameter of the model is, by their names."""
        return self.names.tensors_of(name, parameter)

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name, mapped from its file; raises BarberError if there is none, or it cannot be read."""
        from safetensors import SafetensorError, safe_open

        if key not in self.entries:
            raise BarberError(f"model {self.name!r} has no weight {key}")
        file = self.layout.files[key]
        try:
            if file not in self._mapped:
                self._mapped[file] = safe_open(self.directory / file, "pt")
            tensor: Tensor = self._mapped[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise BarberError(f"model {self.name!r}: {file} cannot be read: {error}") from None
        return tensor

    def linear(self, module: str, transposed: bool = False) -> Tensor:
        """The weight of a Linear, (out, in), in the checkpoint's dtype; a packed one (compressed-tensors) dequantized.

        One expert of a tensor of all has the name of that tensor and its number. `transposed` if the files have
        (in, out). It raises BarberError if the checkpoint has no such module, or packs it in an unknown way.
        """
        key = f"{module}.weight"
        if f"{key}_packed" not in self.entries:
            weight = self._expert(module) if key not in self.entries else None
            weight = self.tensor(key) if weight is None else weight
            return weight.t() if transposed else weight
        parts = {part: self.tensor(f"{key}_{part}") for part in PARTS if f"{key}_{part}" in self.entries}
        try:
            return dequantized(module, parts)
        except BarberError as error:
            raise BarberError(f"model {self.name!r}: {error}") from None

    def has_expert(self, module: str) -> bool:
        """True if the name is that of one expert in a tensor of all."""
        return f"{module}.weight" not in self.entries and self._expert(module) is not None

    def _expert(self, module: str) -> Tensor | None:
        parent, _, index = module.rpartition(".")
        for key in (parent, f"{parent}.weight"):
            entry = self.entries.get(key)
            if entry and len(entry.shape) == 3 and index.isdecimal() and int(index) < entry.shape[0]:
                return self.tensor(key)[int(index)]
        return None

    def reopen(self) -> "SafetensorsWeights":
        """Map the same files anew."""
        weights = SafetensorsWeights(self.name, self.directory, self.headers, self.layout)
        weights.names = self.names
        return weights

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read these tensors while others are worked on."""
        for name in names:
            file = self.layout.files[name]
            read_ahead(self.directory / file, self.headers[file].starts[name], self.entries[name].bytes)


def _files_of(name: str, stated: Mapping[str, str], headers: Mapping[str, Header]) -> dict[str, str]:
    """The file of each tensor; `stated` is what the index says."""
    held: dict[str, str] = {}
    for file, header in headers.items():
        held.update(dict.fromkeys(header.entries, file))
    for key in stated.keys() - held:
        raise BarberError(f"model {name!r}: {stated[key]} lacks {key}, which the index says it holds")
    return {**stated, **held}


class _Index(BaseModel):
    """What counts in an index of shards."""

    weight_map: dict[str, str] = Field(min_length=1)


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / WEIGHTS_INDEX_NAME
    if not path.is_file():
        raise BarberError(f"it has no safetensors files in {directory}")
    index = read_json_object(path, "index")
    try:
        files = _Index.model_validate(index).weight_map.values()
    except ValidationError as error:
        raise BarberError(f"{path.name} is no index: {one_line(error)}") from None
    if any(os.path.basename(file) != file for file in files):
        raise BarberError(f"{path.name} names files outside of its directory")
    return index
