"""Running a comparison, cell by cell: each leaves a file of its own, so that a second run does only what is missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.errors import BarberError
from ...base.output import output_lock
from ...prune.settings import BarberConfig
from ..cells import DENSE, Record, Teller, tell_nobody
from .benchmark import MaskBenchmark
from .cells import Cell
from .plan import ComparePlan, plan_of, split
from .settings import CompareSettings
from .tables import write_tables


@dataclass
class Comparison:
    """The results of a comparison.

    Attributes:
        output: its directory.
        dense: measures of the dense model.
        cells: record of every cell by name, in order; one that failed holds `error`.
        reused: names of those that an earlier run measured.
    """

    output: Path
    dense: Record = field(default_factory=dict)
    cells: dict[str, Record] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of the cells that failed."""
        return [name for name, cell in self.cells.items() if "error" in cell]


def compare(
    model: str, output: str | Path, *, quiet: bool = False, tell: Teller = tell_nobody, **settings: Any
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


def run(
    model: str, output: Path, settings: CompareSettings, base: BarberConfig, quiet: bool, tell: Teller
) -> Comparison:
    """Run a comparison whose settings are split already; see `compare`."""
    plan = plan_of(model, output, settings, base)
    cells = {cell.name: cell for cell in plan.cells}
    result, earlier = Comparison(output), plan.read_all()
    benchmark = MaskBenchmark(plan, quiet) if len(earlier) < len(plan.fingerprints) else None

    def measure(name: str, records: Mapping[str, Record]) -> Record:
        assert benchmark is not None
        if name == DENSE:
            return {"name": name, "fingerprint": plan.fingerprints[name], **benchmark.dense()}
        return cell_record(plan, benchmark, cells[name], records[DENSE])

    def update(name: str, record: Record, reused: bool) -> None:
        if name == DENSE:
            result.dense = record
        else:
            result.cells[name] = record
            result.reused += [name] if reused else []
        write_tables(plan, result.dense, list(result.cells.values()))
        tell(name, record, reused)

    output.mkdir(parents=True, exist_ok=True)
    with output_lock(output):
        write_tables(plan, {}, [])
        plan.fill(earlier, measure, update)
    return result


def cell_record(plan: ComparePlan, benchmark: MaskBenchmark, cell: Cell, dense: Record) -> Record:
    """Run one cell; bad input that shows only then is recorded as its error, without a fingerprint."""
    record = {
        "name": cell.name, "fingerprint": plan.fingerprints[cell.name], "labels": cell.labels,
        "config": cell.config.model_dump(mode="json"),
    }  # fmt: skip
    masks = plan.masks(cell.name) if plan.settings.keep_masks else None
    try:
        return {**record, **benchmark.run(cell, masks), "dense": dense["perplexity"]}
    except BarberError as error:
        return {**record, "fingerprint": None, "error": str(error)}
