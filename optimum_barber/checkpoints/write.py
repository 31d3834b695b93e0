"""A pruned model on disk: the checkpoint, its masks, its record and its report."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import BarberError
from ..models.source import ModelSource
from ..prune.pipeline import Plan
from ..prune.plan import linear_shapes
from ..prune.settings import UNIFORM, BarberConfig
from ..tensors.budget import Shares
from ..tensors.masks import PackedMask, holds_pattern
from ..text.windows import TokenWindows
from .record import (
    MASKS_NAME,
    REPORT_NAME,
    SPARSITY_NAME,
    ModuleSparsity,
    SparsityConfig,
    write_json,
    write_masks,
)

ONE_FILE = 2**50  # bytes; no shard is ever as large


def describe(
    config: BarberConfig,
    plan: Plan,
    source: ModelSource,
    windows: TokenWindows,
    masks: Mapping[str, PackedMask],
    base_model: str | None,
    shares: Shares,
) -> SparsityConfig:
    """The record of a run, for `sparsity_config.json`."""
    modules = {name: module_sparsity(mask) for name, mask in masks.items()}
    samples, length = windows.tokens.shape
    return SparsityConfig(
        pattern=str(plan.pattern),
        target_sparsity=plan.pattern.sparsity,
        sparsity=sum(module.pruned for module in modules.values()) / sum(mask.weights for mask in masks.values()),
        modules=modules,
        ignored=[name for name in linear_shapes(source) if name not in masks],
        producer={"name": config.producer_name, "arguments": {k: str(v) for k, v in plan.arguments.items()}},
        rebuild=config.rebuild.model_dump() if config.rebuild.chain else None,
        reconstruct=config.reconstruct.model_dump() if config.reconstruct.chain else None,
        allocation=_allocation(config, plan, masks, shares) if config.allocation != UNIFORM else None,
        calibration={
            "source": windows.source,
            "split": windows.split,
            "samples": samples,
            "sequence_length": length,
            "seed": config.seed,
            "fingerprint": windows.fingerprint,
        },
        base_model={
            "name": base_model,
            "model_type": source.model_type,
            "dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
        },
        software=software(),
    )


def _allocation(config: BarberConfig, plan: Plan, masks: Mapping[str, PackedMask], shares: Shares) -> dict[str, Any]:
    """How the sparsity was shared out over blocks and Linears, before weights moved within blocks."""
    return {
        "name": config.allocation,
        "arguments": {name: str(value) for name, value in config.allocation_args.items()},
        "sparsity": shares.sparsity,
        "pruned": {name: plan.pattern_of(name).pruned(mask.weights) for name, mask in masks.items()},
    }


def module_sparsity(mask: PackedMask) -> ModuleSparsity:
    """What the record says of one pruned Linear."""
    out, width = mask.shape
    pruned = mask.pruned
    return ModuleSparsity(shape=(out, width), pruned=pruned, sparsity=pruned / mask.weights, sha256=mask.sha256)


def software() -> dict[str, str]:
    """Versions of what the masks depend on."""
    names = ("optimum-barber", "torch", "transformers")
    return {**{name: importlib.metadata.version(name) for name in names}, "python": platform.python_version()}


def check_masks(model: Any, masks: Mapping[str, PackedMask], plan: Plan) -> None:
    """Refuse to write a model whose pruned weights are not exactly zero, or whose masks break the pattern."""
    for name, mask in masks.items():
        keep, weight = mask.unpack(), model.get_parameter(f"{name}.weight")
        if weight.detach().cpu()[~keep].any() or not holds_pattern(keep, plan.pattern):
            raise BarberError(f"the masks do not hold in {name}: nothing was written")


def save_checkpoint(
    directory: Path,
    model: Any,
    tokenizer: Any,
    config: BarberConfig | None,
    record: SparsityConfig,
    masks: Mapping[str, PackedMask],
    report: Mapping[str, Any],
    shard_bytes: int | None,
) -> None:
    """Write everything into `directory`; shards are at most `shard_bytes` large, None for one file."""
    model.config.sparsity_config = pointer(record)
    model.save_pretrained(directory, max_shard_size=shard_bytes or ONE_FILE)
    save_record(directory, tokenizer, config, record, masks, report)


def pointer(record: SparsityConfig) -> dict[str, Any]:
    """What the model's own `config.json` says of the record."""
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
    config: BarberConfig | None,
    record: SparsityConfig,
    masks: Mapping[str, PackedMask],
    report: Mapping[str, Any],
) -> None:
    """Write what lies beside the weights: tokenizer, masks, record, report and settings, if there are any."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_masks(directory / MASKS_NAME, masks, record.pattern)
    write_json(directory / SPARSITY_NAME, record.model_dump())
    write_json(directory / REPORT_NAME, report)
    if config is not None:
        config.save_pretrained(directory)
