"""The page of one pruned or shrunk checkpoint, and of one cell of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.errors import BarberError
from ...base.files import read_json
from ...checkpoints.names import REPORT_NAME
from ...checkpoints.record import SparsityConfig, read_record
from ...checkpoints.structure import read_structure
from .block_charts import block_sections, sparsity_map
from .page import Bars, Lines, Page, Section, Series, Table
from .settings import plain_rows, record_tables, settings_table

Rows = Sequence[Mapping[str, Any]]
UNMEASURED = (
    "Not measured by this run: optimum-barber eval OUT --perplexity TEXT --json FILE, then "
    "optimum-barber report OUT --eval FILE."
)


def checkpoint_page(directory: Path, evaluation: Rows = ()) -> Page:
    """A pruned checkpoint: what `prune` or a later step wrote."""
    record, path = read_record(directory), directory / REPORT_NAME
    report = read_json(path) if path.is_file() else {}
    sections = [Section("Perplexity", perplexity_items(evaluation)), *run_sections(record, report)]
    return Page(f"{directory.resolve().name}: pruning report", summary(record, report), sections)


def cell_page(path: Path) -> Page:
    """One cell of a comparison, out of its JSON file."""
    cell = read_json(path)
    if not isinstance(cell, dict) or "record" not in cell:
        raise BarberError(f"{path} is no finished cell of a comparison")
    record = SparsityConfig.model_validate(cell["record"])
    rows = [{"model": "dense", **cell["dense"]}, {"model": path.stem, **cell["perplexity"]}]
    sections = [Section("Perplexity", perplexity_items(rows)), *run_sections(record, cell["report"])]
    return Page(f"{path.stem}: pruning report", summary(record, cell["report"]), sections)


def summary(record: SparsityConfig, report: Mapping[str, Any]) -> str:
    """The run in two sentences."""
    rebuild = f"rebuilt by {record.rebuild['method']}" if record.rebuild else "not rebuilt"
    said = (
        f"{record.base_model['name'] or 'A model in memory'}, pruned to {record.sparsity:.2%} ({record.pattern}) by "
        f"{record.producer['name']}, {rebuild}."
    )
    if "error_before" in report:
        said += f" Block error, summed: {report['error_before']:.5g} before, {report['error_after']:.5g} after."
    return said


def run_sections(record: SparsityConfig | None, report: Mapping[str, Any]) -> list[Section]:
    """What a pruning run left, from its totals to its fingerprints."""
    found = []
    if report.get("blocks"):
        totals = Table("Totals of the run", ["figure", "value"], plain_rows(report))
        found = [Section("Totals", [totals]), *block_sections(report["blocks"])]
    else:
        found = [Section("Blocks", ["Not here: the step that wrote this checkpoint left no figures of blocks."])]
    if report.get("refine"):
        found.append(Section("Refinement", [refinement_table(report["refine"])]))
    if record is not None:
        modules = {name: module.model_dump() for name, module in record.modules.items()}
        found += [Section("Sparsity", [sparsity_map(modules)]),
                  Section("Settings and fingerprints", list(record_tables(record)))]  # fmt: skip
    return found


def refinement_table(refined: Mapping[str, Any]) -> Table:
    """Rounds of exchanges by the whole model's divergence, made after everything above."""
    rows = [[i, done["swaps"], done["length"], done["before"], done["after"]]
            for i, done in enumerate(refined["rounds"], start=1)]  # fmt: skip
    columns = ["round", "exchanges", "length of the step", "divergence before, nats a token", "after"]
    return Table("Rounds of refine, after all of the above", columns, rows)


def perplexity_items(rows: Rows) -> list[Any]:
    """Bars and a table of perplexities; the dense model's is the line to compare with."""
    rows = [row for row in rows if isinstance(row, Mapping) and "perplexity" in row]
    if not rows:
        return [UNMEASURED]
    dense = next((row for row in rows if row.get("dense_baseline") or row["model"] == "dense"), None)
    values = {str(row["model"]): row["perplexity"] for row in rows if row is not dense}
    first = rows[0]
    note = f"{first['text']}, {first['windows']} windows of {first['sequence_length']} tokens. Lower is better."
    line = ("dense", dense["perplexity"]) if dense else None
    chart = Bars("Perplexity", note, "perplexity", values, line, log=True)
    columns = ["model", "perplexity", "text", "split", "sequence_length", "windows", "available", "dtype"]
    table = Table("Perplexity", [name.replace("_", " ") for name in columns],
                  [[row.get(name) for name in columns] for row in rows])  # fmt: skip
    return [chart, table]


def shrunk_page(directory: Path, evaluation: Rows = ()) -> Page:
    """A model that lost heads and channels."""
    structure, path = read_structure(directory), directory / REPORT_NAME
    report = read_json(path) if path.is_file() else {}
    said = f"{structure.base_model['name'] or 'A model in memory'}, smaller by {structure.removed:.2%} of its blocks."
    rows = [
        [name.replace("_", " "), report["before"].get(name), report["after"].get(name)]
        for name in report.get("after", {})
        if name != "latency"
    ]
    rows += [[kind, report[kind]["before"], report[kind]["after"]] for kind in ("heads", "channels") if kind in report]
    sections = [Section("Perplexity", perplexity_items(evaluation)),
                Section("Size", [Table("Before and after", ["figure", "before", "after"], rows)])]  # fmt: skip
    errors = report.get("layer_errors")
    if errors:
        chart = Lines("Relative error by layer", "Of the hidden states that leave each layer.", "decoder layer",
                      "relative error", [Series("error", list(range(len(errors))), errors)])  # fmt: skip
        sections.append(Section("Error", [chart]))
    content = structure.model_dump(exclude={"layers"})
    sections.append(Section("Settings and fingerprints", [settings_table("Settings", content)]))
    return Page(f"{directory.resolve().name}: shrinking report", said, sections)
