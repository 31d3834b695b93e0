"""Running a comparison, cell by cell: each leaves a file of its own, so that a second run does only what is missing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.calibration import refuse_flat
from ...base.errors import BarberError, unknown_name
from ...base.files import write_json
from ...base.output import check_output, output_lock
from ...checkpoints.write import software
from ...models.loading import ModelReference, resolve_model
from ...prune.settings import BarberConfig
from .cells import Cell, cells_of
from .settings import CompareSettings

DENSE = "dense"
CELLS, MASKS = "cells", "masks"
Teller = Callable[[str, Mapping[str, Any], bool], None]


@dataclass
class Comparison:
    """What a comparison left.

    Attributes:
        output: its directory.
        dense: measures of the dense model.
        cells: record of every cell by name, in order; one that failed holds `error`.
        reused: names of those that were not done again.
    """

    output: Path
    dense: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of the cells that failed."""
        return [name for name, cell in self.cells.items() if "error" in cell]


def compare(
    model: str,
    output: str | Path,
    *,
    quiet: bool = False,
    tell: Teller = lambda name, record, reused: None,
    **settings: Any,
) -> Comparison:
    """Compare producers, rebuilders, patterns and settings on one model.

    Args:
        model: hub id, directory, GGUF file, or `installed:PACKAGE`.
        output: directory of the results; what an earlier run left there is used where it is still true.
        quiet: no progress bars.
        tell: called after the dense model and each cell with its name, its record, and whether it is from before.
        settings: fields of `CompareSettings`, and of `BarberConfig` for what all cells have in common.

    Returns:
        All cells. A cell that fails half-way is recorded as failed and tried again next time.

    Raises:
        CompareError: every fault, before any work.
        BarberError: there is no such model, or the output may not be written.
    """
    chosen, base = split(settings)
    return run(model, Path(output), chosen, base, quiet, tell)


def split(settings: Mapping[str, Any]) -> tuple[CompareSettings, BarberConfig]:
    """The settings of the comparison, and those of all its cells."""
    own = {name: value for name, value in settings.items() if name in CompareSettings.model_fields}
    rest = {name: value for name, value in settings.items() if name not in own}
    legal = set(BarberConfig.model_fields) - {"producer", "producer_args", "rebuild", "pattern", "sparsity"}
    refuse_flat("compare", rest)
    for name in rest:
        if name not in legal:
            raise unknown_name("setting", name, [*CompareSettings.model_fields, *legal])
    return CompareSettings(**own), BarberConfig(**rest)


def run(
    model: str, output: Path, settings: CompareSettings, base: BarberConfig, quiet: bool, tell: Teller
) -> Comparison:
    """See `compare`."""
    from .bench import Bench

    plan, bench = plan_of(model, output, settings, base), None
    if not all(map(plan.held, plan.fingerprints)):
        bench = Bench.open(plan.reference, settings, base, plan.cells, quiet)
    output.mkdir(parents=True, exist_ok=True)
    with output_lock(output):
        return _run(plan, bench, tell)


@dataclass
class ComparePlan:
    """A comparison, checked as far as it can be without its model.

    Attributes:
        reference: where the model lies.
        output: directory of the results.
        settings: of the comparison.
        base: of all cells.
        cells: in order.
        fingerprints: of everything that the dense model's and each cell's figures follow from, by name.
    """

    reference: ModelReference
    output: Path
    settings: CompareSettings
    base: BarberConfig
    cells: list[Cell]
    fingerprints: dict[str, str]

    def held(self, name: str) -> dict[str, Any] | None:
        """What an earlier run left of a cell, if it is still true."""
        path = self.path(name)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        lost = self.settings.keep_masks and name != DENSE and not self.masks(name).is_file()
        return found if found.get("fingerprint") == self.fingerprints[name] and not lost else None

    def path(self, name: str) -> Path:
        """The file of a cell, or of the dense model."""
        return self.output / (f"{DENSE}.json" if name == DENSE else f"{CELLS}/{name}.json")

    def masks(self, name: str) -> Path:
        """The mask file of a cell."""
        return self.output / MASKS / f"{name}.safetensors"


def plan_of(model: str, output: Path, settings: CompareSettings, base: BarberConfig) -> ComparePlan:
    """Check settings, files and output.

    Raises:
        CompareError: every fault.
    """
    from optimum_barber.integrations.lm_eval.settings import pruning_key

    from ...base.fingerprint import digest, of_path
    from ...models.device import choose_device
    from ..recipe.fingerprint import of_model
    from ..report.comparison import COMPARE_NAME
    from .checks import check_files

    cells = cells_of(settings, base)
    check_files(settings, base)
    reference = resolve_model(model)
    check_output(output, (output / COMPARE_NAME).is_file(), [reference.path])
    files = [settings.evaluation, *(task.partition(":")[2] or task for task in settings.tasks)]
    measured = digest([
        settings.evaluation, settings.windows, base.calibration.sequence_length, base.calibration.text_field,
        settings.tasks, settings.limit, base.dtype, [of_path(name) for name in files],
    ])  # fmt: skip
    device = str(choose_device(base.device))
    keys = {c.name: pruning_key(reference, c.config, device) for c in cells}
    prints = {DENSE: digest([of_model(reference.name), reference.full_name, software(), device, measured])}
    prints |= {name: digest([key, measured]) for name, key in keys.items()}
    return ComparePlan(reference, output, settings, base, cells, prints)


def _run(plan: ComparePlan, bench: Any, tell: Teller) -> Comparison:
    """The dense model and every cell in order; the tables are brought up to date after each."""
    from .tables import write_tables

    result = Comparison(plan.output)
    write_tables(plan, result)
    for name, cell in [(DENSE, None), *((cell.name, cell) for cell in plan.cells)]:
        held = plan.held(name)
        record = held or _work(plan, bench, cell, result.dense)
        if cell is None:
            result.dense = record
        else:
            result.cells[name] = record
            result.reused += [name] if held else []
        write_tables(plan, result)
        tell(name, record, held is not None)
    return result


def _work(plan: ComparePlan, bench: Any, cell: Cell | None, dense: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one cell, or the dense model, and leave its file."""
    name = DENSE if cell is None else cell.name
    record: dict[str, Any] = {"name": name, "fingerprint": plan.fingerprints[name]}
    if cell is None:
        record |= bench.dense()
    else:
        record |= {"labels": cell.labels, "config": cell.config.model_dump(mode="json")}
        masks = plan.masks(name) if plan.settings.keep_masks else None
        if masks is not None:
            masks.parent.mkdir(exist_ok=True)
        try:
            record |= {**bench.run(cell, masks), "dense": dense["perplexity"]}
        except BarberError as error:
            record |= {"fingerprint": None, "error": str(error)}
    path = plan.path(name)
    path.parent.mkdir(exist_ok=True)
    write_json(path, record)
    return record
