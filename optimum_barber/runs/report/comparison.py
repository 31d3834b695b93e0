"""The page of a comparison: one table of all cells, and what changes along each axis."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.files import read_json
from ...checkpoints.record import fingerprint_of
from .block_charts import layer_of
from .page import MOST_SERIES, Bars, Lines, Page, Section, Series, Table, Value
from .settings import settings_table

COMPARE_NAME = "compare.json"
CORE = ("producer", "rebuild", "pattern", "sparsity")
TOTALS = ("error_before", "error_after", "pairs", "swaps", "rows", "rows_without_swap")
MEBIBYTE = 2**20
NOT_MEASURED = "Not measured: no run has ended well."
Cell = Mapping[str, Any]
Rows = list[list[Value]]


def comparison_page(directory: Path, evaluation: Sequence[object] = ()) -> Page:
    """The page of a comparison's directory; cells that are not there yet, or of other settings, are left out.

    Args:
        directory: the output of `compare`.
        evaluation: not read; a comparison measures every cell itself.
    """
    content = read_json(directory / COMPARE_NAME)
    cells = []
    for name in content["cells"]:
        path = directory / "cells" / f"{name}.json"
        if path.is_file():
            cell = read_json(path)
            if "error" in cell or cell["fingerprint"] == content["fingerprints"][name]:
                cells.append(cell)
    return page_of_cells(content, cells, read_json(directory / "dense.json"))


def page_of_cells(content: Mapping[str, Any], cells: Sequence[Cell], dense: Mapping[str, Any]) -> Page:
    """The page from its parts.

    Args:
        content: of `compare.json`.
        cells: their records, in order.
        dense: record of the dense model.
    """
    finished = [cell for cell in cells if "error" not in cell]
    reference = dense["perplexity"]["perplexity"]
    sections = [
        Section("All runs", [all_runs(cells, dense)]),
        Section("Perplexity", [*perplexity_bars(cells, reference), *along_axes(finished)]),
        Section("Tasks", tasks(finished, dense)),
        Section("Error by layer", layer_errors(finished)),
        Section("Time and memory", cost(finished)),
        Section("Settings and fingerprints", settings(content, cells)),
    ]
    return Page(f"{Path(content['model']).name}: comparison", summary(content, cells, dense["perplexity"]), sections)


def summary(content: Mapping[str, Any], cells: Sequence[Cell], measured: Mapping[str, Any]) -> str:
    """How many runs there are, and how perplexity was measured."""
    count = len(content["cells"])
    calibrations = {calibration_fingerprint(cell) for cell in cells if "error" not in cell}
    sets = "one calibration set" if len(calibrations) <= 1 else f"{len(calibrations)} calibration sets"
    text = (
        f"{content['model']}: {len(cells)} of {count} runs on {sets}, perplexity on {measured['text']} "
        f"({measured['windows']} windows of {measured['sequence_length']} tokens), dense {measured['perplexity']:.4g}."
    )
    if len(cells) < count:
        text += f" {count - len(cells)} are still missing."
    return text


def axes_of(cells: Sequence[Cell]) -> list[str]:
    """The axes along which the cells differ, the producer and the rebuild in any case."""
    values: dict[str, set[str]] = {}
    for name in _label_names(cells):
        values[name] = {str(cell["labels"].get(name)) for cell in cells}
    return [name for name in values if name in ("producer", "rebuild") or len(values[name]) > 1]


def _label_names(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["labels"]))


def label(cell: Cell, leave: Sequence[str] = ()) -> str:
    """A name that tells a cell from others on the page, the axes `leave` aside."""
    labels = cell["labels"]
    name = labels["producer"]
    if labels["rebuild"] != "none" and "rebuild" not in leave:
        name += f" + {labels['rebuild']}"
    for axis, value in labels.items():
        if value is not None and axis not in CORE and axis not in leave:
            name += f", {axis} {value}"
    return name


def density(cell: Cell) -> str:
    """The pattern, or the sparsity in per cent."""
    labels = cell["labels"]
    return f"{100 * labels['sparsity']:g} %" if labels["pattern"] == "unstructured" else str(labels["pattern"])


def full_label(cell: Cell) -> str:
    """Label and density."""
    return f"{label(cell)}, {density(cell)}"


def by_density(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by density."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(density(cell), []).append(cell)
    return groups


def all_runs(cells: Sequence[Cell], dense: Mapping[str, Any]) -> Table:
    """One row for each cell, the dense model first."""
    axes = axes_of(cells)
    measures = list(dict.fromkeys(name for cell in (dense, *cells) for name in accuracies(cell)))
    columns = [
        *axes, "perplexity", *measures, "error", "error before", "error after", "swaps", "seconds", "peak MiB", "note",
    ]  # fmt: skip
    first = ["dense", *[None] * (len(axes) - 1), *scores(dense, measures)]
    rows: Rows = [first + [None] * (len(columns) - len(first))]
    for cell in cells:
        report = cell.get("report", {})
        memory = None if "error" in cell else cell["peak_memory"] / MEBIBYTE
        rows.append([
            *map(cell["labels"].get, axes), *scores(cell, measures), error_of(cell), report.get("error_before"),
            report.get("error_after"), report.get("swaps"), cell.get("seconds"), memory, cell.get("error"),
        ])  # fmt: skip
    return Table("All runs", columns, rows)


def scores(record: Cell, measures: Sequence[str]) -> list[Any]:
    """Perplexity and accuracies; None where a cell failed."""
    perplexity = None if record.get("error") else record["perplexity"]["perplexity"]
    return [perplexity, *map(accuracies(record).get, measures)]


def accuracies(record: Cell) -> dict[str, float]:
    """The accuracy of each task, and their mean where there are several."""
    by_task: dict[str, float] = {}
    for task, metrics in record.get("tasks", {}).items():
        if "acc" in metrics:
            by_task[task] = metrics["acc"]
    if len(by_task) > 1:
        by_task["mean accuracy"] = sum(by_task.values()) / len(by_task)
    return by_task


def perplexity_bars(cells: Sequence[Cell], dense: float) -> list[Bars]:
    """One chart for each density."""
    charts = []
    for name, group in by_density(cells).items():
        values = {}
        for cell in group:
            values[label(cell)] = None if "error" in cell else cell["perplexity"]["perplexity"]
        charts.append(Bars(f"Perplexity at {name}", "Lower is better.", "perplexity", values, ("dense", dense), True))
    return charts


def along_axes(cells: Sequence[Cell]) -> list[Any]:
    """Perplexity over every axis of numbers that takes several values."""
    items: list[Any] = []
    for axis in _label_names(cells):
        curves = curves_along(cells, axis)
        if curves:
            items += axis_items(curves, axis)
    return items


def curves_along(cells: Sequence[Cell], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Points (place on the axis, perplexity) of at least two cells that differ along it alone, by their label.

    Empty where the axis is none of numbers; a pattern has no place on the axis `sparsity`.
    """
    densities = len(by_density(cells))
    curves: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        place = number(cell["labels"].get(axis))
        if place is None or (axis == "sparsity" and cell["labels"]["pattern"] != "unstructured"):
            continue
        name = label(cell, [axis])
        if axis != "sparsity" and densities > 1:
            name += f", {density(cell)}"
        curves.setdefault(name, []).append((place, cell["perplexity"]["perplexity"]))
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def axis_items(curves: Mapping[str, Sequence[tuple[float, float]]], axis: str) -> list[Any]:
    """The chart of the first curves, and a line that counts those left out."""
    series = []
    for name, points in curves.items():
        x, y = zip(*points, strict=True)
        series.append(Series(name, x, y))
    places = [x for line in series for x in line.x]
    wide = min(places) > 0 and max(places) / min(places) >= 8
    axis_name = "ratio α" if axis == "rebuild_ratio" else axis.replace("_", " ")
    title = f"Perplexity over {axis_name}"
    if wide:
        axis_name += ", log scale"
    items: list[Any] = [Lines(title, "", axis_name, "perplexity, log scale", series[:MOST_SERIES], wide, True)]
    if len(series) > MOST_SERIES:
        items.append(f"Not drawn in “{title}”: {len(series) - MOST_SERIES} more lines; the table has them.")
    return items


def number(value: Any) -> float | None:
    """A label as a number, where it is one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def tasks(cells: Sequence[Cell], dense: Mapping[str, Any]) -> list[Any]:
    """Every metric of every task, with its standard error."""
    rows = task_rows("dense", dense)
    for cell in cells:
        rows += task_rows(full_label(cell), cell)
    if not rows:
        return ["Not measured: the comparison has no tasks."]
    return [Table("Tasks", ["run", "task", "metric", "value", "standard error", "rows"], rows)]


def task_rows(name: str, record: Cell) -> Rows:
    """One run's rows of the table of tasks."""
    rows: Rows = []
    for task, metrics in record.get("tasks", {}).items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr") and metric != "rows":
                rows.append([name, task, metric, value, metrics.get(f"{metric}_stderr"), metrics.get("rows")])
    return rows


def layer_errors(cells: Sequence[Cell]) -> list[Any]:
    """Error after the run by layer: one chart for each kind of error and density."""
    charts = []
    kinds = dict.fromkeys(map(error_of, cells))
    for kind in kinds:
        alike = [cell for cell in cells if error_of(cell) == kind]
        for name, group in by_density(alike).items():
            title = f"Block error at {name}"
            if len(kinds) > 1:
                title += f", {kind}"
            charts.append(layer_chart(title, group))
    return charts or [NOT_MEASURED]


def layer_chart(title: str, cells: Sequence[Cell]) -> Lines:
    """Error by layer of the first cells, attention and MLP added."""
    series = []
    for cell in cells[:MOST_SERIES]:
        sums: dict[float, float] = {}
        for block in cell["report"]["blocks"]:
            sums[layer_of(block)] = sums.get(layer_of(block), 0.0) + block["error_after"]
        series.append(Series(label(cell), list(sums), list(sums.values())))
    note = "Attention and MLP added."
    if len(cells) > MOST_SERIES:
        note += f" The first {MOST_SERIES} runs."
    return Lines(title, note, "decoder layer", "block error E, log scale", series, log_y=True)


def error_of(cell: Cell) -> str:
    """The kind of a cell's block error; errors of different kinds cannot be compared."""
    return str(cell["config"]["rebuild"].get("error", "absolute"))


def cost(cells: Sequence[Cell]) -> list[Any]:
    """Seconds and memory of every run."""
    if not cells:
        return [NOT_MEASURED]
    seconds, peaks = {}, {}
    for cell in cells:
        seconds[full_label(cell)] = cell["seconds"]
        peaks[full_label(cell)] = cell["peak_memory"] / MEBIBYTE
    return [
        Bars("Seconds", "Of pruning alone.", "seconds", seconds),
        Bars("Peak memory", "Of the whole process, or of the GPU.", "MiB", peaks),
    ]


def settings(content: Mapping[str, Any], cells: Sequence[Cell]) -> list[Table]:
    """Settings of the comparison, and every cell's own with its fingerprints."""
    keys = ("format_version", "status", "model", "software")
    rows: Rows = []
    own = []
    for cell in cells:
        rows.append([cell["name"], cell.get("fingerprint"), mask_fingerprint(cell), calibration_fingerprint(cell)])
        own.append(settings_table(f"Settings of {cell['name']}", cell["config"], folded=True))
    return [
        settings_table("Comparison", {**{key: content[key] for key in keys}, **content["settings"]}),
        settings_table("What all runs have in common", content["base"]),
        Table("Fingerprints", ["run", "of settings and files", "of the masks", "of the calibration tokens"], rows),
        *own,
    ]


def mask_fingerprint(cell: Cell) -> str | None:
    """The fingerprint of all masks of a cell; None where it has none."""
    modules = cell.get("record", {}).get("modules")
    if not modules:
        return None
    return fingerprint_of({name: module["sha256"] for name, module in modules.items()})


def calibration_fingerprint(cell: Cell) -> str | None:
    """The fingerprint of the calibration tokens."""
    return cell.get("record", {}).get("calibration", {}).get("fingerprint")


def flat_rows(cells: Sequence[Cell], dense: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row for each cell for CSV, the dense model first."""
    rows: list[dict[str, object]] = [{"name": "dense", **figures(dense)}]
    for cell in cells:
        row: dict[str, object] = {"name": cell["name"], **cell["labels"]}
        if "error" in cell:
            row["error"] = cell["error"]
        else:
            row |= {"reached_sparsity": cell["report"]["sparsity"], **figures(cell)}
            row |= {name: cell["report"][name] for name in TOTALS}
            row |= {"seconds": cell["seconds"], "peak_memory": cell["peak_memory"]}
            row |= {"masks": mask_fingerprint(cell), "calibration": calibration_fingerprint(cell)}
        rows.append(row)
    return rows


def figures(record: Cell) -> dict[str, object]:
    """Perplexity and all metrics of all tasks."""
    flat: dict[str, object] = {"perplexity": record["perplexity"]["perplexity"]}
    for task, metrics in record.get("tasks", {}).items():
        flat |= {f"{task}.{metric}": value for metric, value in metrics.items()}
    return flat
