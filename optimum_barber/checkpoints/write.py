"""A pruned model on disk: the checkpoint, its masks, its record and its report."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.errors import BarberError
from ..base.files import write_json
from ..tensors.masks import PackedMask, holds_pattern
from ..tensors.patterns import SparsityPattern
from .names import CONFIG_NAME, MASKS_NAME, REPORT_NAME, SPARSITY_NAME, WEIGHTS_INDEX_NAME
from .record import ModuleSparsity, SparsityConfig, write_masks
from .shards import Layout

ONE_FILE = 2**50  # bytes; no shard is ever as large


def module_sparsity(mask: PackedMask, transposed: bool = False) -> ModuleSparsity:
    """The record of one pruned Linear; `transposed` if the files hold its weight as (in, out)."""
    out, width = mask.shape
    pruned, sparsity = mask.pruned, mask.pruned / mask.weights
    return ModuleSparsity(
        shape=(out, width), pruned=pruned, sparsity=sparsity, sha256=mask.sha256, transposed=transposed
    )


def software() -> dict[str, str]:
    """Versions of what the masks depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("optimum-barber", "torch", "transformers")}
    return {**versions, "python": platform.python_version()}


def check_masks(weights: Mapping[str, Tensor], masks: Mapping[str, PackedMask], pattern: SparsityPattern) -> None:
    """Refuse to write weights, (out, in), that are pruned but not exactly zero, or masks that break the pattern."""
    for name, mask in masks.items():
        keep, weight = mask.unpack(), weights[name]
        if weight.detach().cpu()[~keep].any() or not holds_pattern(keep, pattern):
            raise BarberError(f"the masks do not hold in {name}: nothing was written")


def save_weights(directory: Path, model: Any, record: SparsityConfig, shard_bytes: int | None) -> None:
    """Write a model and its configuration; shards are at most `shard_bytes` large, None for one file."""
    model.config.sparsity_config = _pointer(record)
    model.save_pretrained(directory, max_shard_size=shard_bytes or ONE_FILE)


def save_configs(directory: Path, model: Any, record: SparsityConfig, layout: Layout, size: int) -> None:
    """Write the configuration files of a model without weights, and the index of its weights, `size` bytes in all."""
    model.config.sparsity_config = _pointer(record)
    model.config.dtype = record.base_model["dtype"]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if layout.index is not None:
        metadata = {**layout.index.get("metadata", {}), "total_size": size}
        write_json(directory / WEIGHTS_INDEX_NAME, {**layout.index, "metadata": metadata})


def _pointer(record: SparsityConfig) -> dict[str, Any]:
    """The entry for the record in the model's own `config.json`."""
    return {
        "format_version": record.format_version,
        "pattern": record.pattern,
        "sparsity": record.sparsity,
        "config_file": SPARSITY_NAME,
        "masks_file": MASKS_NAME,
    }


def save_record(
    directory: Path,
    tokenizer: Any,
    settings: Mapping[str, Any] | None,
    record: SparsityConfig,
    masks: Mapping[str, PackedMask],
    report: Mapping[str, Any],
) -> None:
    """Write the files beside the weights: tokenizer, masks, record, report, and the settings if there are any."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_masks(directory / MASKS_NAME, masks, record.pattern)
    write_json(directory / SPARSITY_NAME, record.model_dump())
    write_json(directory / REPORT_NAME, report)
    if settings is not None:
        write_json(directory / CONFIG_NAME, settings)
