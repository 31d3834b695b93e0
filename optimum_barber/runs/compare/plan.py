"""A comparison checked as far as it can be without its model, and the fingerprints of its cells."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...base.calibration import refuse_flat
from ...base.errors import unknown_name
from ...base.files import digest, path_digest
from ...base.output import check_output
from ...checkpoints.write import software
from ...models.device import summing_device
from ...models.loading import ModelReference, resolve_model
from ...prune.settings import BarberConfig
from ...text.sources import text_faults
from ..cells import DENSE, CellTable, Record
from ..fingerprint import of_model, of_pruned
from ..report.comparison import COMPARE_NAME
from ..tasks.evaluate import check_tasks
from .cells import Cell, all_faults, cells_of, noted
from .settings import OF_A_CELL, CompareSettings


@dataclass
class ComparePlan(CellTable):
    """The table of a comparison; `base` holds the settings of all cells."""

    reference: ModelReference
    settings: CompareSettings
    base: BarberConfig
    cells: dict[str, Cell]

    def path(self, name: str) -> Path:
        """Return the file of a cell, or of the dense model."""
        return self.output / f"{DENSE}.json" if name == DENSE else super().path(name)

    def masks(self, name: str) -> Path:
        """Return the mask file of a cell."""
        return self.output / "masks" / f"{name}.safetensors"

    def read(self, name: str) -> Record | None:
        """Return what an earlier run left of a cell, if it is still true and its masks, if wanted, are there."""
        if self.settings.keep_masks and name != DENSE and not self.masks(name).is_file():
            return None
        return super().read(name)


def split(settings: Mapping[str, Any]) -> tuple[CompareSettings, BarberConfig]:
    """Split settings into those of the comparison and those of all its cells."""
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, value in settings.items():
        part = own if name in CompareSettings.model_fields else shared
        part[name] = value
    refuse_flat("compare", shared)
    legal = set(BarberConfig.model_fields) - OF_A_CELL
    for name in shared:
        if name not in legal:
            raise unknown_name("setting", name, [*CompareSettings.model_fields, *legal])
    return CompareSettings(**own), BarberConfig(**shared)


def plan_of(model: str, output: Path, settings: CompareSettings, base: BarberConfig) -> ComparePlan:
    """Check settings, files and output; raises CompareError with all faults of the settings, or of the files."""
    cells = {cell.name: cell for cell in cells_of(settings, base)}
    device = summing_device(base.device)
    with all_faults() as faults:
        faults += text_faults([*base.calibration.texts, settings.evaluation])
        if settings.tasks:
            with noted(faults):
                check_tasks(settings.tasks)
    reference = resolve_model(model)
    check_output(output, (output / COMPARE_NAME).is_file(), [reference.path])
    fingerprints = _fingerprints(reference, settings, base, cells, device)
    return ComparePlan(output, fingerprints, reference, settings, base, cells)


def _fingerprints(
    reference: ModelReference,
    settings: CompareSettings,
    base: BarberConfig,
    cells: Mapping[str, Cell],
    device: torch.device,
) -> dict[str, str]:
    """Digest all that decides the figures of the dense model and of each cell on a type of device."""
    files = [settings.evaluation]
    for task in settings.tasks:
        files.append(task.partition(":")[2] or task)
    evaluation = digest([
        settings.evaluation, settings.windows, base.calibration.sequence_length, base.calibration.text_field,
        base.calibration.bos, settings.tasks, settings.limit, base.dtype, [path_digest(name) for name in files],
    ])  # fmt: skip
    fingerprints = {DENSE: digest([of_model(reference.name), reference.full_name, software(), device.type, evaluation])}
    for name, cell in cells.items():
        fingerprints[name] = digest([of_pruned(reference, cell.config, device), evaluation])
    return fingerprints
