"""Running a comparison, cell by cell: each leaves a file of its own, so that a second run does only what is missing."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.files import csv_table, write_file, write_json
from ...base.notebook import notebook_table
from ...base.output import output_lock
from ...base.ranks import Ranks, all_ranks
from ...checkpoints.write import software
from ...models.device import summing_device
from ...prune.settings import BarberConfig
from ..cells import DENSE, Record, Teller, tell_nobody
from ..report.comparison import COMPARE_NAME, flat_rows, page_of_cells
from ..report.html import html
from ..report.markdown import markdown
from .benchmark import MaskBenchmark
from .plan import ComparePlan, plan_of, split
from .settings import OF_A_CELL, CompareSettings


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

    def _repr_html_(self) -> str:
        rows = [{"cell": "dense", **_figures(self.dense)}] if self.dense else []
        for name, cell in self.cells.items():
            rows.append({"cell": name, **_figures(cell)})
        return notebook_table(f"Comparison in {self.output}", rows, ["cell", "perplexity", "fault"])


def _figures(cell: Record) -> Record:
    """Return what a notebook shows of one cell: its perplexity, or why it failed."""
    return {"perplexity": cell.get("perplexity", {}).get("perplexity"), "fault": cell.get("error")}


def compare(
    model: str, output: str | Path, *, quiet: bool = False, tell: Teller = tell_nobody, **settings: Any
) -> Comparison:
    """Compare producers, rebuilders, patterns and settings on one model.

    Where a `torch.distributed` process group is initialised, all its ranks must call this with the same arguments: they
    share the cells.

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
    return run(model, Path(output), *split(settings), quiet, tell)


def run(
    model: str, output: Path, settings: CompareSettings, base: BarberConfig, quiet: bool, tell: Teller
) -> Comparison:
    """Run a comparison whose settings are split already; see `compare`."""
    plan = plan_of(model, output, settings, base)
    with all_ranks(summing_device(base.device)) as ranks:
        ranks.agree(plan.fingerprints)  # all have looked at the output before the first one writes to it
        return _fill(plan, quiet or not ranks.first, tell, ranks)


def _fill(plan: ComparePlan, quiet: bool, tell: Teller, ranks: Ranks) -> Comparison:
    """Measure the cells that are missing, shared among the ranks; the first one writes the tables."""
    output, result, earlier, measure = plan.output, Comparison(plan.output), plan.read_all(), None
    if len(earlier) < len(plan.fingerprints):
        measure = MaskBenchmark(plan, quiet).measure

    def update(name: str, record: Record, reused: bool) -> None:
        if name == DENSE:
            result.dense = record
        else:
            result.cells[name] = record
            result.reused += [name] if reused else []
        _write_tables(plan, result.dense, list(result.cells.values()))
        tell(name, record, reused)

    with ExitStack() as stack:
        if ranks.first:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(output_lock(output))
            _write_tables(plan, {}, [])
        plan.fill(earlier, measure, update, ranks)
    return result


def _write_tables(plan: ComparePlan, dense: Record, records: Sequence[Record]) -> None:
    """Bring `compare.json`, `compare.csv`, `compare.md` and the page up to date with the cells that are done."""
    content = {
        "format_version": 1,
        "status": "finished" if len(records) == len(plan.cells) else "unfinished",
        "model": plan.reference.full_name,
        "settings": plan.settings.model_dump(mode="json"),
        "base": plan.base.model_dump(mode="json", exclude=OF_A_CELL),
        "cells": list(plan.cells),
        "fingerprints": plan.fingerprints,
        "software": software(),
    }
    write_json(plan.output / COMPARE_NAME, content)
    if not records:
        return
    rows = flat_rows(records, dense)
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    page = page_of_cells(content, records, dense)
    write_file(plan.output / "compare.csv", csv_table(rows, list(columns)))
    write_file(plan.output / "compare.md", markdown(page))
    write_file(plan.output / "report.html", html(page))
