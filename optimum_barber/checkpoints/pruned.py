"""A pruned checkpoint opened for the next step, and its masks carried on to what that step writes."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.files import write_json
from ..models.loading import ModelReference, load_model, load_tokenizer, resolve_model
from .experts import read_experts
from .names import EXPERTS_NAME, SPARSITY_NAME, STRUCTURE_NAME
from .record import MaskFile, SparsityConfig, read_record
from .structure import read_structure


@dataclass
class PrunedModel:
    """A causal LM on the CPU with the masks that its weights hold, whose hashes are checked on access.

    A dense model has no record, and no masks.
    """

    model: Any
    tokenizer: Any
    reference: ModelReference
    record: SparsityConfig | None
    masks: MaskFile | dict[str, Any]

    @classmethod
    def load(cls, name: str | Path, dtype: str = "auto") -> "PrunedModel":
        """Open a directory that `prune` or a later step wrote, or any dense model."""
        reference = resolve_model(name)
        record, masks = open_masks(reference.directory)
        return cls(load_model(reference, dtype), load_tokenizer(reference), reference, record, masks)

    def keep(self, name: str) -> Tensor:
        """The keep mask of a Linear, (out, in) bool."""
        keep: Tensor = self.masks[name].unpack()
        return keep


def open_masks(directory: str | Path) -> tuple[SparsityConfig | None, MaskFile | dict[str, Any]]:
    """Record and mask file of a checkpoint; (None, {}) where it is dense."""
    if not (Path(directory) / SPARSITY_NAME).is_file():
        return None, {}
    record = read_record(directory)
    return record, MaskFile(Path(directory) / record.masks)


def carry_structure(source: Path, target: Path, step: Mapping[str, Any]) -> None:
    """Give `target` the record of the heads, channels and experts that were cut before, with one more step in it."""
    if (source / STRUCTURE_NAME).is_file():
        structure = read_structure(source)
        structure.steps.append(dict(step))
        write_json(target / STRUCTURE_NAME, structure.model_dump())
    if (source / EXPERTS_NAME).is_file():
        experts = read_experts(source)
        experts.steps.append(dict(step))
        write_json(target / EXPERTS_NAME, experts.model_dump())


def carry_masks(source: Path, target: Path, step: Mapping[str, Any]) -> None:
    """Give `target` the masks of `source`, with one more step in the record; where `source` is dense it has none."""
    carry_structure(source, target, step)
    record, _ = open_masks(source)
    if record is None:
        return
    shutil.copyfile(source / record.masks, target / record.masks)
    record.steps.append(dict(step))
    write_json(target / SPARSITY_NAME, record.model_dump())
