"""The record of a pruning run, for `sparsity_config.json`."""

from collections.abc import Mapping
from typing import Any

from ..checkpoints.record import SparsityConfig
from ..checkpoints.write import module_sparsity, software
from ..models.linears import linear_shapes
from ..models.source import ModelSource
from ..tensors.budget import Shares
from ..tensors.masks import PackedMask
from ..text.windows import TokenWindows
from .pipeline import Plan
from .settings import UNIFORM, BarberConfig


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
