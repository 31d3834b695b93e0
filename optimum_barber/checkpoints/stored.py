"""A checkpoint on disk, opened: the tensors that it holds, each read when asked for, and the files that a copy has."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..models.loading import ModelReference, brief
from .names import FILE_NAME, INDEX_NAME
from .shards import Entry, Header, read_header
from .weights import CheckpointWeights


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors lie in safetensors files.

    Attributes:
        files: name of each tensor's file.
        metadata: of each file.
        index: content of the index file; None for a checkpoint of one file.
    """

    files: Mapping[str, str]
    metadata: Mapping[str, dict[str, str]]
    index: dict[str, Any] | None = None


class StoredWeights(Protocol):
    """The weights of a causal LM on disk, whatever the format."""

    @property
    def name(self) -> str:
        """Of the model, for messages."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model is given where its configuration names none."""

    @property
    def whole(self) -> str | None:
        """Why the model can only be loaded whole; None where its tensors can be read one by one."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of every tensor, as `tensor` gives it."""

    @property
    def layout(self) -> Layout:
        """The files that a pruned copy is written to."""

    @property
    def unpacks(self) -> bool:
        """Whether `tensor` makes its result in memory, and does not map it."""

    def named_as(self, model: nn.Module) -> None:
        """Take on the names that this model, which may be without weights, gives its tensors."""

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name."""

    def reopened(self) -> "StoredWeights":
        """The same anew: what is mapped by one is not changed or held by the other."""

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read these tensors while others are worked on."""


@dataclass
class SafetensorsWeights:
    """Safetensors files as they are mapped; every header is checked on opening, no weight is read."""

    name: str
    paths: Mapping[str, Path]
    headers: Mapping[str, Header]
    layout: Layout
    whole: str | None = None
    unpacks: bool = False

    def __post_init__(self) -> None:
        self._mapped = CheckpointWeights(dict(self.paths), self.name)
        self.entries = {name: self.headers[path.name].entries[name] for name, path in self.paths.items()}

    @classmethod
    def of(cls, reference: ModelReference) -> "SafetensorsWeights":
        """Open the safetensors files of a local directory or hub snapshot.

        Raises:
            BarberError: there are none, one is missing, truncated or damaged, or the index speaks of others.
        """
        path = reference.directory / INDEX_NAME
        try:
            index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            files = set(index["weight_map"].values()) if index else {FILE_NAME}
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
        paths = {name: reference.directory / file for name, file in where.items()}
        layout = Layout(where, {file: header.metadata for file, header in headers.items()}, index)
        return cls(reference.name, paths, headers, layout)

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating-point tensor, or float32: what transformers takes where no config says it."""
        entries = (entry for header in self.headers.values() for entry in header.entries.values())
        return next((entry.dtype for entry in entries if entry.dtype.is_floating_point), torch.float32)

    def named_as(self, model: nn.Module) -> None:
        """The files have the model's names already."""

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name, mapped from its file."""
        return self._mapped.tensor(key)

    def reopened(self) -> "SafetensorsWeights":
        """The same files, mapped anew."""
        return SafetensorsWeights(self.name, self.paths, self.headers, self.layout)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read these tensors while others are worked on."""
        for name in names:
            path, header = self.paths[name], self.headers[self.paths[name].name]
            read_ahead(path, header.starts[name], header.entries[name].bytes)


def read_ahead(path: Path, start: int, size: int) -> None:
    """Have the system read a part of a file that will be asked for soon, where it can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
