"""The page of one pruned or shrunk checkpoint, and of one cell of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.errors import BarberError
from ...base.files import read_json
from ...checkpoints.experts import read_experts
from ...checkpoints.names import REPORT_NAME
from ...checkpoints.record import SparsityConfig, read_record
from ...checkpoints.structure import read_structure
from .block_charts import block_sections, sparsity_map
from .page import Bars, Lines, Page, Rows, Section, Series, Table, settings_table

Evaluation = Sequence[Mapping[str, Any]]
UNMEASURED = (
    "Not measured yet: optimum-barber eval OUT --perplexity TEXT keeps its figures in OUT, then "
    "optimum-barber report OUT shows them."
)
PERPLEXITY_COLUMNS = ("model", "perplexity", "text", "split", "sequence_length", "windows", "available", "dtype")


def checkpoint_page(directory: Path, evaluation: Evaluation = ()) -> Page:
    """The page of a pruned checkpoint: what `prune` or a later step wrote."""
    return _pruning_page(directory.resolve().name, read_record(directory), _report(directory), evaluation)


def cell_page(path: Path) -> Page:
    """The page of one cell of a comparison, from its JSON file."""
    cell = read_json(path)
    if not isinstance(cell, dict) or "record" not in cell:
        raise BarberError(f"{path} is no finished cell of a comparison")
    rows = [{"model": "dense", **cell["dense"]}, {"model": path.stem, **cell["perplexity"]}]
    return _pruning_page(path.stem, SparsityConfig.model_validate(cell["record"]), cell["report"], rows)


def _pruning_page(name: str, record: SparsityConfig, report: Mapping[str, Any], evaluation: Evaluation) -> Page:
    sections = [Section("Perplexity", _perplexity_items(evaluation)), *run_sections(record, report)]
    return Page(f"{name}: pruning report", _summary(record, report), sections)


def _report(directory: Path) -> Mapping[str, Any]:
    path = directory / REPORT_NAME
    return read_json(path) if path.is_file() else {}


def _summary(record: SparsityConfig, report: Mapping[str, Any]) -> str:
    model = record.base_model["name"] or "A model in memory"
    rebuild = f"rebuilt by {record.rebuild['method']}" if record.rebuild else "not rebuilt"
    text = f"{model}, pruned to {record.sparsity:.2%} ({record.pattern}) by {record.producer['name']}, {rebuild}."
    if "error_before" in report:
        text += f" Block error, summed: {report['error_before']:.5g} before, {report['error_after']:.5g} after."
    return text


def run_sections(record: SparsityConfig, report: Mapping[str, Any]) -> list[Section]:
    """All that a pruning run left, from its totals to its fingerprints."""
    sections = [Section("Blocks", ["Not here: the step that wrote this checkpoint left no figures of blocks."])]
    if report.get("blocks"):
        totals: Rows = []
        for name, value in report.items():
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                totals.append([name.replace("_", " "), value])
        total = Section("Totals", [Table("Totals of the run", ["figure", "value"], totals)])
        sections = [total, *block_sections(report["blocks"])]
    if report.get("refine"):
        sections.append(Section("Refinement", [_refinement_table(report["refine"])]))
    sections.append(Section("Sparsity", [sparsity_map(record)]))
    sections.append(Section("Settings and fingerprints", _record_tables(record)))
    return sections


def _record_tables(record: SparsityConfig) -> list[Table]:
    """All of a `sparsity_config.json`; the modules come last and folded."""
    rows: Rows = []
    for name, module in record.modules.items():
        shape = f"{module.shape[0]} × {module.shape[1]}"
        rows.append([name, shape, module.pruned, module.sparsity, module.sha256])
    content = record.model_dump(exclude={"modules"})
    return [
        settings_table("Settings", {"mask_fingerprint": record.fingerprint, **content}),
        Table("Fingerprints of the masks", ["Linear", "shape", "pruned", "sparsity", "SHA-256"], rows, folded=True),
    ]


def _refinement_table(refined: Mapping[str, Any]) -> Table:
    rows: Rows = []
    for look in refined["looks"]:
        rows.append([look["step"], look["divergence"], look["swaps"], look["length"]])
    columns = ["step", "divergence, nats a token", "exchanged since the look before", "length of a step"]
    return Table("Steps of refine, after all of the above", columns, rows)


def _perplexity_items(evaluation: Evaluation) -> list[Any]:
    """Bars and a table of perplexities; the dense model's is the line to compare with."""
    measured = [row for row in evaluation if isinstance(row, Mapping) and "perplexity" in row]
    if not measured:
        return [UNMEASURED]
    reference = None
    values = {}
    for row in measured:
        if reference is None and _is_dense(row):
            reference = ("dense", row["perplexity"])
        else:
            values[str(row["model"])] = row["perplexity"]
    first = measured[0]
    note = f"{first['text']}, {first['windows']} windows of {first['sequence_length']} tokens. Lower is better."
    columns = [name.replace("_", " ") for name in PERPLEXITY_COLUMNS]
    table = Table("Perplexity", columns, [list(map(row.get, PERPLEXITY_COLUMNS)) for row in measured])
    return [Bars("Perplexity", note, "perplexity", values, reference, log=True), table]


def _is_dense(row: Mapping[str, Any]) -> bool:
    return bool(row.get("dense_baseline")) or row["model"] == "dense"


def shrunk_page(directory: Path, evaluation: Evaluation = ()) -> Page:
    """The page of a model that lost heads and channels."""
    structure, report = read_structure(directory), _report(directory)
    name = structure.base_model["name"] or "A model in memory"
    sections = [Section("Perplexity", _perplexity_items(evaluation)), Section("Size", [_size_table(report)])]
    errors = report.get("layer_errors")
    if errors:
        note = "Of the hidden states that leave each layer."
        series = [Series("error", list(range(len(errors))), errors)]
        chart = Lines("Relative error by layer", note, "decoder layer", "relative error", series)
        sections.append(Section("Error", [chart]))
    content = structure.model_dump(exclude={"layers"})
    sections.append(Section("Settings and fingerprints", [settings_table("Settings", content)]))
    text = f"{name}, smaller by {structure.removed:.2%} of its blocks."
    return Page(f"{directory.resolve().name}: shrinking report", text, sections)


def experts_page(directory: Path, evaluation: Evaluation = ()) -> Page:
    """Build the page of a model that lost experts."""
    record = read_experts(directory)
    counts = record.counts
    name = record.base_model["name"] or "A model in memory"
    settings = settings_table("Settings", record.model_dump(exclude={"layers"}))
    sections = [
        Section("Perplexity", _perplexity_items(evaluation)),
        Section("Size", [_size_table(_report(directory))]),
        Section("Settings and fingerprints", [settings]),
    ]
    text = f"{name}, with {counts['after']} of {counts['before']} experts in every sparse MLP."
    return Page(f"{directory.resolve().name}: shrinking report", text, sections)


def _size_table(report: Mapping[str, Any]) -> Table:
    rows: Rows = []
    for name, after in report.get("after", {}).items():
        if name != "latency":
            rows.append([name.replace("_", " "), report["before"].get(name), after])
    for kind in ("heads", "channels", "experts"):
        if kind in report:
            rows.append([kind, report[kind]["before"], report[kind]["after"]])
    return Table("Before and after", ["figure", "before", "after"], rows)
