"""A pruned model on disk: the checkpoint, its masks, its record and its report."""

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ..base.errors import BarberError
from ..base.files import write_json
from ..models.loading import ModelReference, brief, load_generation_config
from ..tensors.masks import PackedMask, holds_pattern
from ..tensors.patterns import SparsityPattern
from .carry import carry_config, carry_files, save_tokenizer, source_of
from .names import CONFIG_NAME, GENERATION_CONFIG_NAME, MASKS_NAME, REPORT_NAME, SPARSITY_NAME, WEIGHTS_INDEX_NAME
from .record import ModuleSparsity, SparsityConfig, write_masks
from .shards import Layout

logger = logging.getLogger(__name__)
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


def check_settings(model: Any) -> None:
    """Refuse, before any work, a model whose configuration transformers would not write."""
    with TemporaryDirectory() as folder:
        _write(model.config.save_pretrained, folder)


def _write(save: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    try:
        save(*arguments, **options)
    except ValueError as error:
        raise BarberError(f"transformers does not write this model: {brief(error)}") from None


def save_model(
    directory: Path, model: Any, reference: ModelReference | None, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write a model in memory, in shards as large as those that it was loaded from; see `save_settings`.

    `tensors`, by their names in the files, are written in the place of its own.
    """
    settings = model.generation_config
    model.generation_config = type(settings)() if settings is not None else None  # an invalid one ends nothing here
    try:
        shard = reference.shard_bytes if reference else None
        own = {} if tensors is None else {"state_dict": tensors, "save_original_format": False}
        _write(model.save_pretrained, directory, max_shard_size=shard or ONE_FILE, **own)
    finally:
        model.generation_config = settings
    save_settings(directory, model, reference)


def save_settings(directory: Path, model: Any, reference: ModelReference | None) -> None:
    """Write the configuration files of a model: its source's, carried over, where it has one; else transformers'."""
    source = source_of(reference)
    if source is None:
        _write(model.config.save_pretrained, directory)
    else:
        carry_config(source, model.config, directory)
        carry_files(source.directory, directory)
    if not model.can_generate():
        return
    settings, path = model.generation_config, directory / GENERATION_CONFIG_NAME
    if source is not None and settings.to_dict() == load_generation_config(source).to_dict():
        if not (source.directory / GENERATION_CONFIG_NAME).is_file():
            path.unlink(missing_ok=True)
        return
    try:
        settings.save_pretrained(directory)
    except ValueError as error:
        logger.warning("the generation settings are written as they are, though invalid: %s", brief(error))
        settings.to_json_file(path, use_diff=True)


def save_pruned(directory: Path, model: Any, record: SparsityConfig, reference: ModelReference | None) -> None:
    """Write a pruned model in memory; see `save_model`."""
    model.config.sparsity_config = _pointer(record)
    save_model(directory, model, reference)


def save_configs(
    directory: Path, model: Any, record: SparsityConfig, reference: ModelReference | None, layout: Layout, size: int
) -> None:
    """Write the configuration files of a model without weights, and the index of its weights, `size` bytes in all."""
    model.config.sparsity_config = _pointer(record)
    model.config.dtype = record.base_model["dtype"]
    model.config.architectures = [type(model).__name__]
    save_settings(directory, model, reference)
    if layout.index is not None:
        stated = layout.index.get("metadata")
        metadata = {**(stated if isinstance(stated, dict) else {}), "total_size": size}
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
    reference: ModelReference | None,
    settings: Mapping[str, Any] | None,
    record: SparsityConfig,
    masks: Mapping[str, PackedMask],
    report: Mapping[str, Any],
) -> None:
    """Write the files beside the weights: tokenizer, masks, record, report, and the settings if there are any."""
    save_tokenizer(directory, tokenizer, reference)
    write_masks(directory / MASKS_NAME, masks, record.pattern)
    write_json(directory / SPARSITY_NAME, record.model_dump())
    write_json(directory / REPORT_NAME, report)
    if settings is not None:
        write_json(directory / CONFIG_NAME, settings)
