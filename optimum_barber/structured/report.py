"""What a cut leaves in writing: the record of what stayed, its pointer in config.json, and the report."""

from typing import Any

import torch

from ..calibration import TokenWindows
from ..checkpoint import software
from ..latency import latency, macs_per_token, size_of
from ..pipeline import peak_memory
from ..source import working_copy
from .plan import Cut
from .record import STRUCTURE_NAME, PrunedStructure
from .scoring import Kept
from .settings import ShrinkConfig, ShrinkSettings
from .units import CHANNELS, HEADS

PROMPT = 512  # tokens of a prefill that is measured, or what the model takes


def describe_cut(
    config: ShrinkConfig, cut: Cut, kept: Kept, windows: TokenWindows | None, base_model: str | None
) -> PrunedStructure:
    """The record of a cut, for `pruned_structure.json`."""
    heads, before = cut.units[HEADS], cut.replayed
    dtype = str(next(cut.source.model.parameters()).dtype).removeprefix("torch.")
    return PrunedStructure(
        head_unit="query head" if heads.groups > 1 else "key-value group" if heads.heads > 1 else "head",
        removed=cut.budget.share,
        layers={
            layer: {kind: {"of": cut.units[kind].count, "kept": chosen[kind]} for kind in (HEADS, CHANNELS)}
            for layer, chosen in kept.items()
        },  # type: ignore[arg-type]
        scorer=before.scorer if before else {"name": config.scorer, "arguments": cut.arguments},
        settings=before.settings if before else {n: getattr(config, n) for n in ShrinkSettings.model_fields},
        calibration=before.calibration if before else calibration_record(config, windows),
        base_model={"name": base_model, "model_type": cut.source.model_type, "dtype": dtype},
        model_type=cut.config.model_type,
        software=software(),
    )


def calibration_record(config: ShrinkConfig, windows: TokenWindows | None) -> dict[str, Any] | None:
    """Where the calibration windows come from, for the record."""
    if windows is None:
        return None
    samples, length = windows.tokens.shape
    return {
        "source": windows.source, "split": windows.split, "samples": samples, "sequence_length": length,
        "seed": config.seed, "fingerprint": windows.fingerprint,
    }  # fmt: skip


def pointer(structure: PrunedStructure) -> dict[str, Any]:
    """What `config.json` says about the cut."""
    return {
        "format_version": structure.format_version,
        "scorer": structure.scorer["name"],
        "removed": structure.removed,
        "structure_file": STRUCTURE_NAME,
    }


def measured(model: Any, prompt: int, device: torch.device, timing: bool) -> dict[str, Any]:
    """Size, MACs and speed of one model; on a CPU it is timed in float32, whatever its dtype."""
    found: dict[str, Any] = {**size_of(model), "macs_per_token": macs_per_token(model.config, prompt)}
    if timing:
        dtype = torch.float32 if device.type == "cpu" else next(model.parameters()).dtype
        with working_copy(model, device, dtype):
            found["latency"] = latency(model, prompt)
    return found


def report_of(config: ShrinkConfig, cut: Cut, small: Any, seconds: dict[str, float], timing: bool) -> dict[str, Any]:
    """Counts, sizes and speeds before and after, for `report.json`."""
    model = cut.source.model
    prompt = min(PROMPT, (getattr(model.config, "max_position_embeddings", None) or PROMPT + 1) - 1)
    counts = {
        kind: {"before": unit.count * unit.heads, "after": cut.budget.kept[kind] * unit.heads}
        for kind, unit in cut.units.items()
    }
    return {
        "asked": config.remove,
        "removed": cut.budget.share,
        **counts,
        "seconds": seconds,
        "peak_memory": peak_memory(),
        "before": measured(model, prompt, cut.source.device, timing),
        "after": measured(small, prompt, cut.source.device, timing),
    }
