"""The page of a comparison: one table of all cells, and what changes along each axis."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.files import beside, read_json
from ...checkpoints.record import fingerprint_of
from .block_charts import LAYER, MEBIBYTE, layer_of
from .page import MOST_SERIES, Bars, Lines, Page, Rows, Section, Series, Table, grouped, settings_table

COMPARE_NAME = "compare.json"
CORE = ("producer", "rebuild", "pattern", "sparsity")
TOTALS = ("error_before", "error_after", "pairs", "swaps", "rows", "rows_without_swap")
NOT_MEASURED = "Not measured: no run has ended well."
Cell = Mapping[str, Any]


def comparison_page(directory: Path) -> Page:
    """The page of a comparison's directory; cells that are not there yet, or of other settings, are left out."""
    content = read_json(directory / COMPARE_NAME)
    cells = []
    for name in content["cells"]:
        path = beside(directory / COMPARE_NAME, f"{name}.json", "cells")
        if path.is_file():
            cell = read_json(path)
            if "error" in cell or cell["fingerprint"] == content["fingerprints"][name]:
                cells.append(cell)
    return page_of_cells(content, cells, read_json(directory / "dense.json"))


def page_of_cells(content: Mapping[str, Any], cells: Sequence[Cell], dense: Mapping[str, Any]) -> Page:
    """The page of a comparison from the content of `compare.json`, the records of its cells and the dense model's."""
    finished = [cell for cell in cells if "error" not in cell]
    sections = [
        Section("All runs", [all_runs(cells, dense)]),
        Section("Perplexity", [*_perplexity_bars(cells, dense["perplexity"]["perplexity"]), *_along_axes(finished)]),
        Section("Tasks", [_tasks(finished, dense)]),
        Section("Error by layer", _layer_errors(finished) or [NOT_MEASURED]),
        Section("Time and memory", _cost(finished) if finished else [NOT_MEASURED]),
        Section("Settings and fingerprints", _settings(content, cells)),
    ]
    summary = _summary(content, len(cells), finished, dense["perplexity"])
    return Page(f"{Path(content['model']).name}: comparison", summary, sections)


def _summary(content: Mapping[str, Any], count: int, finished: Sequence[Cell], dense: Mapping[str, Any]) -> str:
    total = len(content["cells"])
    calibrations = len(set(map(_calibration_fingerprint, finished)))
    sets = "one calibration set" if calibrations <= 1 else f"{calibrations} calibration sets"
    missing = f" {total - count} are still missing." if count < total else ""
    return (
        f"{content['model']}: {count} of {total} runs on {sets}, perplexity on {dense['text']} "
        f"({dense['windows']} windows of {dense['sequence_length']} tokens), dense {dense['perplexity']:.4g}.{missing}"
    )


def _axes_of(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["labels"]))


def _label(cell: Cell, left_out: str = "") -> str:
    """A name that tells a cell from others of its density, one axis left out."""
    labels = cell["labels"]
    name = labels["producer"]
    if labels["rebuild"] != "none" and left_out != "rebuild":
        name += f" + {labels['rebuild']}"
    for axis, value in labels.items():
        if value is not None and axis not in (*CORE, left_out):
            name += f", {axis} {value}"
    return str(name)


def _density(cell: Cell) -> str:
    labels = cell["labels"]
    return f"{100 * labels['sparsity']:g} %" if labels["pattern"] == "unstructured" else str(labels["pattern"])


def _full_label(cell: Cell) -> str:
    return f"{_label(cell)}, {_density(cell)}"


def all_runs(cells: Sequence[Cell], dense: Mapping[str, Any]) -> Table:
    """One row for each cell, the dense model first; the columns are the axes along which the cells differ."""
    axes = []
    for name in _axes_of(cells):
        values = {str(cell["labels"].get(name)) for cell in cells}
        if name in ("producer", "rebuild") or len(values) > 1:
            axes.append(name)
    measures: dict[str, float] = {}
    for record in (dense, *cells):
        measures |= _accuracies(record)
    columns = [
        *axes, "perplexity", *measures, "error", "error before", "error after", "swaps", "seconds", "peak MiB", "note",
    ]  # fmt: skip
    first = ["dense", *[None] * (len(axes) - 1), *_scores(dense, measures)]
    rows: Rows = [first + [None] * (len(columns) - len(first))]
    for cell in cells:
        report = cell.get("report", {})
        memory = None if "error" in cell else cell["peak_memory"] / MEBIBYTE
        rows.append([
            *map(cell["labels"].get, axes), *_scores(cell, measures), _error_kind(cell), report.get("error_before"),
            report.get("error_after"), report.get("swaps"), cell.get("seconds"), memory, cell.get("error"),
        ])  # fmt: skip
    return Table("All runs", columns, rows)


def _scores(record: Cell, measures: Iterable[str]) -> list[Any]:
    perplexity = None if "error" in record else record["perplexity"]["perplexity"]
    return [perplexity, *map(_accuracies(record).get, measures)]


def _accuracies(record: Cell) -> dict[str, float]:
    """The accuracy of each task, and their mean where there are several."""
    accuracies: dict[str, float] = {}
    for task, metrics in record.get("tasks", {}).items():
        if "acc" in metrics:
            accuracies[task] = metrics["acc"]
    if len(accuracies) > 1:
        accuracies["mean accuracy"] = sum(accuracies.values()) / len(accuracies)
    return accuracies


def _perplexity_bars(cells: Sequence[Cell], dense: float) -> list[Bars]:
    charts = []
    for name, group in grouped(cells, _density).items():
        values = {_label(cell): _scores(cell, ())[0] for cell in group}
        charts.append(Bars(f"Perplexity at {name}", "Lower is better.", "perplexity", values, ("dense", dense), True))
    return charts


def _along_axes(cells: Sequence[Cell]) -> list[Any]:
    """Perplexity over every axis of numbers that takes several values; a remark counts the lines left out."""
    items: list[Any] = []
    for axis in _axes_of(cells):
        series = _series_along(cells, axis)
        if not series:
            continue
        lowest = min(min(line.x) for line in series)
        highest = max(max(line.x) for line in series)
        wide = lowest > 0 and highest / lowest >= 8
        name = "ratio α" if axis == "rebuild_ratio" else axis.replace("_", " ")
        scale = f"{name}, log scale" if wide else name
        title = f"Perplexity over {name}"
        items.append(Lines(title, "", scale, "perplexity, log scale", series[:MOST_SERIES], wide, True))
        if len(series) > MOST_SERIES:
            items.append(f"Not drawn in “{title}”: {len(series) - MOST_SERIES} more lines; the table has them.")
    return items


def _series_along(cells: Sequence[Cell], axis: str) -> list[Series]:
    """A line through the perplexities of at least two cells that differ along this axis alone.

    A pattern has no place on the axis `sparsity`.
    """
    several = len(grouped(cells, _density)) > 1
    curves: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        try:
            place = float(cell["labels"].get(axis))
        except (TypeError, ValueError):
            continue
        if axis == "sparsity" and cell["labels"]["pattern"] != "unstructured":
            continue
        name = _label(cell, axis)
        if axis != "sparsity" and several:
            name += f", {_density(cell)}"
        curves.setdefault(name, []).append((place, cell["perplexity"]["perplexity"]))
    return [Series.through(name, sorted(points)) for name, points in curves.items() if len(points) > 1]


def _tasks(cells: Sequence[Cell], dense: Mapping[str, Any]) -> Table | str:
    """Every metric of every task, with its standard error."""
    rows: Rows = []
    for name, record in [("dense", dense), *((_full_label(cell), cell) for cell in cells)]:
        for task, metrics in record.get("tasks", {}).items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr") and metric != "rows":
                    rows.append([name, task, metric, value, metrics.get(f"{metric}_stderr"), metrics.get("rows")])
    if not rows:
        return "Not measured: the comparison has no tasks."
    return Table("Tasks", ["run", "task", "metric", "value", "standard error", "rows"], rows)


def _layer_errors(cells: Sequence[Cell]) -> list[Lines]:
    """Error after the run by layer: one chart for each kind of error, which cannot be compared, and density."""
    charts = []
    kinds = grouped(cells, _error_kind)
    for kind, alike in kinds.items():
        suffix = f", {kind}" if len(kinds) > 1 else ""
        for name, group in grouped(alike, _density).items():
            charts.append(_layer_chart(f"Block error at {name}{suffix}", group))
    return charts


def _layer_chart(title: str, cells: Sequence[Cell]) -> Lines:
    series = []
    for cell in cells[:MOST_SERIES]:
        sums: dict[float, float] = {}
        for block in cell["report"]["blocks"]:
            sums[layer_of(block)] = sums.get(layer_of(block), 0.0) + block["error_after"]
        series.append(Series(_label(cell), list(sums), list(sums.values())))
    note = "Attention and MLP added."
    if len(cells) > MOST_SERIES:
        note += f" The first {MOST_SERIES} runs."
    return Lines(title, note, LAYER, "block error E, log scale", series, log_y=True)


def _error_kind(cell: Cell) -> str:
    return str(cell["config"]["rebuild"].get("error", "absolute"))


def _cost(cells: Sequence[Cell]) -> list[Bars]:
    seconds = {_full_label(cell): cell["seconds"] for cell in cells}
    peaks = {_full_label(cell): cell["peak_memory"] / MEBIBYTE for cell in cells}
    return [
        Bars("Seconds", "Of pruning alone.", "seconds", seconds),
        Bars("Peak memory", "Of the whole process, or of the GPU.", "MiB", peaks),
    ]


def _settings(content: Mapping[str, Any], cells: Sequence[Cell]) -> list[Table]:
    """Settings of the comparison, and every cell's own with its fingerprints."""
    run = {key: content[key] for key in ("format_version", "status", "model", "software")}
    rows: Rows = []
    own = []
    for cell in cells:
        rows.append([cell["name"], cell.get("fingerprint"), _mask_fingerprint(cell), _calibration_fingerprint(cell)])
        own.append(settings_table(f"Settings of {cell['name']}", cell["config"], folded=True))
    return [
        settings_table("Comparison", {**run, **content["settings"]}),
        settings_table("What all runs have in common", content["base"]),
        Table("Fingerprints", ["run", "of settings and files", "of the masks", "of the calibration tokens"], rows),
        *own,
    ]


def _mask_fingerprint(cell: Cell) -> str | None:
    modules = cell.get("record", {}).get("modules")
    if not modules:
        return None
    return fingerprint_of({name: module["sha256"] for name, module in modules.items()})


def _calibration_fingerprint(cell: Cell) -> str | None:
    return cell.get("record", {}).get("calibration", {}).get("fingerprint")


def flat_rows(cells: Sequence[Cell], dense: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row for each cell for CSV, the dense model first."""
    rows: list[dict[str, object]] = [{"name": "dense", **_figures(dense)}]
    for cell in cells:
        row: dict[str, object] = {"name": cell["name"], **cell["labels"]}
        if "error" in cell:
            row["error"] = cell["error"]
        else:
            row |= {"reached_sparsity": cell["report"]["sparsity"], **_figures(cell)}
            row |= {name: cell["report"][name] for name in TOTALS}
            row |= {"seconds": cell["seconds"], "peak_memory": cell["peak_memory"]}
            row |= {"masks": _mask_fingerprint(cell), "calibration": _calibration_fingerprint(cell)}
        rows.append(row)
    return rows


def _figures(record: Cell) -> dict[str, object]:
    """Perplexity and all metrics of all tasks."""
    figures: dict[str, object] = {"perplexity": record["perplexity"]["perplexity"]}
    for task, metrics in record.get("tasks", {}).items():
        figures |= {f"{task}.{metric}": value for metric, value in metrics.items()}
    return figures
