"""The files of a cut: the record of what stayed, its pointer in config.json, and the report."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..base.memory import peak_memory
from ..checkpoints.structure import PrunedStructure
from ..checkpoints.write import software
from ..models.limits import positions
from ..models.measure import latency, macs_per_token, size_of
from ..models.source import working_copy
from ..text.windows import TokenWindows
from .cut_errors import block_errors, layer_errors
from .plan import Cut
from .settings import ShrinkConfig, ShrinkSettings
from .units import CHANNELS, HEADS, Kept

ERROR_WINDOWS = 4  # calibration windows for the error by layer
PROMPT = 512  # tokens of a prefill that is measured, or what the model takes


def describe_cut(
    config: ShrinkConfig, cut: Cut, kept: Kept, windows: TokenWindows | None, base_model: str | None
) -> PrunedStructure:
    """The record of a cut, for `pruned_structure.json`."""
    dtype = str(next(cut.source.model.parameters()).dtype).removeprefix("torch.")
    layers: dict[str, Any] = {}
    for layer, units in kept.items():
        layers[layer] = {kind: {"of": cut.units[kind].count, "kept": units[kind]} for kind in (HEADS, CHANNELS)}
    if cut.replayed is not None:
        origin = cut.replayed
        scorer, settings, calibration = origin.scorer, origin.settings, origin.calibration
    else:
        scorer = {"name": config.scorer, "arguments": cut.arguments}
        last = ("compensate", "structure")
        names = [name for name in ShrinkSettings.model_fields if name not in (*last, "remove_experts")]
        settings = {name: getattr(config, name) for name in names}
        # version 0.1.0 had one setting more, and always refused it
        settings |= {"skip_layers": 0, **{name: getattr(config, name) for name in last}}
        calibration = None
        if windows is not None:
            calibration = windows.as_record(config.seed)
    return PrunedStructure(
        head_unit=cut.units[HEADS].name,  # type: ignore[arg-type]
        removed=cut.budget.share,
        layers=layers,
        scorer=scorer,
        settings={**settings, "compensate": config.compensate},
        calibration=calibration,
        base_model={"name": base_model, "model_type": cut.source.model_type, "dtype": dtype},
        model_type=cut.config.model_type,
        software=software(),
    )


def prompt_of(config: Any) -> int:
    """Tokens of the prefill that is measured on a model."""
    return min(PROMPT, (positions(config) or PROMPT + 1) - 1)


def report_of(
    config: ShrinkConfig,
    cut: Cut,
    kept: Kept,
    small: Any,
    windows: TokenWindows | None,
    seconds: dict[str, float],
    timing: bool,
    biases: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Any]:
    """Counts, sizes, errors and speeds before and after, for `report.json`."""
    model = cut.source.model
    counts = {}
    for kind, unit in cut.units.items():
        counts[kind] = {"before": unit.count * unit.heads, "after": cut.budget.kept[kind] * unit.heads}
    tokens = None if windows is None else windows.tokens[:ERROR_WINDOWS]
    return {
        "asked": config.remove,
        "removed": cut.budget.share,
        **counts,
        "seconds": seconds,
        "peak_memory": peak_memory(),
        **_compare(model, small, tokens, cut.source.device, timing),
        "blocks": None if tokens is None else block_errors(cut.source, tokens, kept, cut.units, biases),
    }


def _compare(model: Any, small: Any, windows: Tensor | None, device: torch.device, timing: bool) -> dict[str, Any]:
    """Size, MACs and speed of both models and the error by layer; on a CPU in float32, whatever their dtype."""
    prompt = prompt_of(model.config)
    dtype = torch.float32 if device.type == "cpu" else next(model.parameters()).dtype
    models = {"before": model, "after": small}
    figures: dict[str, Any] = {}
    for state, each in models.items():
        figures[state] = {**size_of(each), "macs_per_token": macs_per_token(each.config, prompt)}
    with working_copy(model, device, dtype), working_copy(small, device, dtype):
        figures["layer_errors"] = None if windows is None else layer_errors(model, small, windows)
        if timing:
            for state, each in models.items():
                figures[state]["latency"] = latency(each, prompt)
    return figures
