"""The weights of a model on disk, whatever their format: the interface of `safetensors` and `gguf`."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .shards import Entry


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
        """Name of the model, for messages."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model where its configuration names none."""

    @property
    def obstacle(self) -> str | None:
        """Reason why tensors cannot be read one by one; None where they can."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of every tensor, as `tensor` gives it."""

    @property
    def layout(self) -> Layout:
        """The files that a pruned copy is written to."""

    @property
    def unpacks(self) -> bool:
        """True if `tensor` makes its result in memory, and does not map it."""

    def match_names(self, model: nn.Module) -> None:
        """Name the tensors as this model, which may be without weights, does."""

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name."""

    def reopen(self) -> "StoredWeights":
        """Map the files anew: a change to a tensor of one mapping does not show in the other."""

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read these tensors while others are worked on."""


def read_ahead(path: Path, start: int, size: int) -> None:
    """Have the system read a part of a file that will be needed soon, where it can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
