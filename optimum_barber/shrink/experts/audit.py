"""A record of removed experts, and the check of a checkpoint against it and against the dense model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...base.errors import BarberError
from ...checkpoints.experts import PrunedExperts, read_experts
from ...checkpoints.safetensors import SafetensorsWeights
from ...checkpoints.write import software
from ...models.file_names import FileNames
from ...models.loading import ModelReference, empty_model, load_model
from ...text.windows import TokenWindows
from ..audit import dense_model, differences
from ..settings import ShrinkConfig
from .remove import ExpertRemoval, plan_removal
from .scores import cut_experts


def describe_removal(
    config: ShrinkConfig,
    removal: ExpertRemoval,
    kept: Mapping[str, list[int]],
    scores: Mapping[str, list[float]],
    windows: TokenWindows | None,
    base_model: str | None,
) -> PrunedExperts:
    """The record of a removal, for `pruned_experts.json`."""
    layers = {}
    for name, count in removal.experts.items():
        layers[name] = {"of": count, "kept": kept[name], "scores": scores[name]}
    dtype = str(next(removal.source.model.parameters()).dtype).removeprefix("torch.")
    return PrunedExperts(
        layers=layers,  # type: ignore[arg-type]
        scorer=config.scorer,
        calibration=None if windows is None else {**windows.as_dict(), "seed": config.seed},
        base_model={"name": base_model, "model_type": removal.source.model_type, "dtype": dtype},
        software=software(),
    )


def audit_experts(directory: str | Path, base: str | None = None, weights: bool = True) -> tuple[str, list[str]]:
    """Check a checkpoint that lost experts: every tensor is the recorded cut of the dense model's.

    Args:
        directory: of the checkpoint.
        base: the dense model; None for the recorded one, where it is on this machine.
        weights: whether to look at the dense model at all.

    Returns:
        What was checked, in words, and one line for every tensor that differs.
    """
    record, stored = read_experts(directory), SafetensorsWeights.open(directory)
    counts = record.counts
    kept = f"{len(record.layers)} sparse MLPs cut to {counts['after']} of {counts['before']} experts"
    if record.steps:
        return f"{kept}: weights have changed since, by {record.steps[-1]['name']}; nothing was compared", []
    reference = dense_model(record.base_model["name"], base) if weights else None
    if reference is None:
        return f"{kept}: the dense model is not at hand, nothing was compared", []
    faults = _faults(record, stored, reference)
    return f"{kept}: every kept weight is that of {reference.name}" if not faults else f"{kept}: FAILED", faults


def _faults(record: PrunedExperts, stored: SafetensorsWeights, reference: ModelReference) -> list[str]:
    counts = record.counts
    model = load_model(reference, record.base_model["dtype"])
    removal = plan_removal(model, 1 - counts["after"] / counts["before"], record.scorer, torch.device("cpu"))
    if removal.experts.keys() != record.layers.keys():
        raise BarberError(f"{reference.name} has other sparse MLPs than are recorded")
    expected = cut_experts(model.state_dict(), record.kept, removal.rows)
    names = FileNames.of(empty_model(removal.config))
    parts: dict[str, Tensor] = {}
    for parameter, tensor in expected.items():
        parts |= names.tensors_of(parameter, tensor)
    return [f"{module}.{fault}" for module, fault in differences(parts, stored, set()).items()]
