"""The result of a pruning run, and its record for `sparsity_config.json`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import FailedCheckError
from ..base.notebook import notebook_table
from ..checkpoints.push import Published
from ..checkpoints.record import SparsityConfig
from ..checkpoints.write import module_sparsity, software
from ..models.linears import matrices_of_model
from ..models.matrices import is_transposed
from ..tensors.budget import Shares
from ..tensors.masks import PackedMask
from .effort import UNIFORM
from .pipeline import SHOWN, BlockReport
from .plan import Run

SUMMED = ("error_before", "error_after", "pairs", "swaps", "rows", "rows_without_swap", "seconds")


def check_error(report: BlockReport) -> None:
    """Refuse a block whose error is not finite: no rebuild could tell a better mask from a worse one."""
    if not math.isfinite(report.error_before + report.error_after):
        raise FailedCheckError(
            f"block {report.block} has the error {report.error_before:g}, then {report.error_after:g}: its outputs, "
            "or the squares of them, are beyond float32"
        )


@dataclass
class SparsifyResult(Published):
    """What `sparsify` did.

    Attributes:
        masks: keep mask of each pruned Linear, packed; `.unpack()` gives the bool tensor.
        sparsity_config: the record that goes into `sparsity_config.json`.
        reports: one a block, in the order of computation.
        shares: how the sparsity was shared out over the blocks.
        directory: where the checkpoint was written, which `push_to_hub` uploads; None if it was not.
    """

    masks: Mapping[str, PackedMask]
    sparsity_config: SparsityConfig
    reports: list[BlockReport] = field(default_factory=list)
    shares: Shares | None = None
    directory: Path | None = None

    def _repr_html_(self) -> str:
        record = self.sparsity_config
        place = self.directory or "memory"
        title = f"{record.sparsity:.2%} of {len(self.masks)} Linears pruned, {record.pattern}, in {place}"
        return notebook_table(title, map(vars, self.reports), ["block", *SHOWN])

    def as_report(self) -> dict[str, Any]:
        """The content of `report.json`: totals, and every block."""
        blocks = [asdict(report) for report in self.reports]
        content: dict[str, Any] = {"sparsity": self.sparsity_config.sparsity}
        for key in SUMMED:
            content[key] = sum(block[key] for block in blocks)
        content["peak_memory"] = max((report.peak_memory for report in self.reports), default=0)
        content["allocation"] = None
        if self.shares is not None and self.sparsity_config.allocation is not None:
            content["allocation"] = asdict(self.shares)
        content["blocks"] = blocks
        return content


def describe(run: Run, masks: Mapping[str, PackedMask], shares: Shares) -> SparsityConfig:
    """The record of a run, for `sparsity_config.json`."""
    config, plan, windows = run.config, run.plan, run.windows
    linears = matrices_of_model(run.source)
    modules = {name: module_sparsity(mask, is_transposed(linears[name])) for name, mask in masks.items()}
    pruned = sum(module.pruned for module in modules.values())
    dtype = str(next(run.source.model.parameters()).dtype).removeprefix("torch.")
    calibration = windows.as_record(config.seed)
    rebuild = config.rebuild.model_dump() if config.rebuild.chain else None
    reconstruct = config.reconstruct.model_dump() if config.reconstruct.chain else None
    ignored = [name for name in linears if name not in masks]
    return SparsityConfig(
        pattern=str(plan.pattern),
        target_sparsity=plan.pattern.sparsity,
        sparsity=pruned / sum(mask.weights for mask in masks.values()),
        modules=modules,
        ignored=ignored,
        producer={"name": config.producer_name, "arguments": _as_text(plan.arguments)},
        rebuild=rebuild,
        reconstruct=reconstruct,
        allocation=_allocation(run, masks, shares),
        calibration=calibration,
        base_model={"name": run.base_model, "model_type": run.source.model_type, "dtype": dtype},
        software=software(),
    )


def _allocation(run: Run, masks: Mapping[str, PackedMask], shares: Shares) -> dict[str, Any] | None:
    """How the sparsity was shared out over blocks and Linears, before weights moved within blocks."""
    if run.config.allocation == UNIFORM:
        return None
    return {
        "name": run.config.allocation,
        "arguments": _as_text(run.config.allocation_args),
        "sparsity": shares.sparsity,
        "pruned": {name: run.plan.pattern_of(name).pruned(mask.weights) for name, mask in masks.items()},
    }


def _as_text(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in arguments.items()}
