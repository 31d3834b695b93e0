"""The page of a comparison: one table of all cells, and what changes along each axis."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...base.files import read_json
from .block_charts import layer_of
from .page import Bars, Lines, Page, Section, Series, Table, Value
from .settings import settings_table
from .style import LIGHT

COMPARE_NAME = "compare.json"
CORE = ("producer", "rebuild", "pattern", "sparsity")
TOTALS = ("error_before", "error_after", "pairs", "swaps", "rows", "rows_without_swap")
MEBIBYTE = 2**20
Cell = Mapping[str, Any]


def comparison_page(directory: Path) -> Page:
    """The page of a comparison's directory; cells that are not there yet, or of other settings, are left out."""
    content = read_json(directory / COMPARE_NAME)
    paths = {name: directory / "cells" / f"{name}.json" for name in content["cells"]}
    held = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    cells = [c for name, c in held.items() if "error" in c or c["fingerprint"] == content["fingerprints"][name]]
    return page_of_cells(content, cells, read_json(directory / "dense.json"))


def page_of_cells(content: Mapping[str, Any], cells: Sequence[Cell], dense: Mapping[str, Any]) -> Page:
    """The page out of its parts.

    Args:
        content: of `compare.json`.
        cells: their records, in order.
        dense: record of the dense model.
    """
    done, first, count = [cell for cell in cells if "error" not in cell], dense["perplexity"], len(content["cells"])
    missing = f" {count - len(cells)} are still missing." if len(cells) < count else ""
    said = (
        f"{content['model']}: {len(cells)} of {count} runs on {calibrations(done)}, perplexity on {first['text']} "
        f"({first['windows']} windows of {first['sequence_length']} tokens), dense {first['perplexity']:.4g}.{missing}"
    )
    sections = [
        Section("All runs", [all_runs(cells, dense)]),
        Section("Perplexity", [*perplexity_bars(cells, first["perplexity"]), *along_axes(done, first["perplexity"])]),
        Section("Tasks", tasks(done, dense)),
        Section("Error by layer", layer_errors(done)),
        Section("Time and memory", cost(done)),
        Section("Settings and fingerprints", settings(content, cells)),
    ]
    return Page(f"{Path(content['model']).name}: comparison", said, sections)


def calibrations(cells: Sequence[Cell]) -> str:
    """How many calibration sets there are: one, unless an axis decides them."""
    count = len({calibration_fingerprint(cell) for cell in cells})
    return "one calibration set" if count <= 1 else f"{count} calibration sets"


def axes_of(cells: Sequence[Cell]) -> list[str]:
    """The axes along which the cells differ, the producer and the rebuild in any case."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["labels"]))
    return [
        name for name in names
        if name in ("producer", "rebuild") or len({str(cell["labels"].get(name)) for cell in cells}) > 1
    ]  # fmt: skip


def label(cell: Cell, leave: Sequence[str] = ()) -> str:
    """What tells a cell from others on the page."""
    labels = cell["labels"]
    rest = [f"{k} {v}" for k, v in labels.items() if k not in (*CORE, *leave) and v is not None]
    rebuild = "" if labels["rebuild"] == "none" or "rebuild" in leave else f" + {labels['rebuild']}"
    return ", ".join([f"{labels['producer']}{rebuild}", *rest])


def density(cell: Cell) -> str:
    """The pattern, or the sparsity in per cent."""
    labels = cell["labels"]
    return f"{100 * labels['sparsity']:g} %" if labels["pattern"] == "unstructured" else str(labels["pattern"])


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by density."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(density(cell), []).append(cell)
    return found


def all_runs(cells: Sequence[Cell], dense: Mapping[str, Any]) -> Table:
    """One row a cell, the dense model first."""
    axes = axes_of(cells)
    measures = list(dict.fromkeys(name for cell in (dense, *cells) for name in accuracies(cell)))
    columns = [
        *axes, "perplexity", *measures, "error", "error before", "error after", "swaps", "seconds", "peak MiB",
        "note",
    ]  # fmt: skip
    rows: list[list[Value]] = [
        ["dense", *[None] * (len(axes) - 1), dense["perplexity"]["perplexity"],
         *map(accuracies(dense).get, measures), *[None] * 7]
    ]  # fmt: skip
    for cell in cells:
        report, failed = cell.get("report", {}), cell.get("error")
        rows.append([
            *map(cell["labels"].get, axes), None if failed else cell["perplexity"]["perplexity"],
            *map(accuracies(cell).get, measures), error_of(cell), report.get("error_before"), report.get("error_after"),
            report.get("swaps"), cell.get("seconds"), None if failed else cell["peak_memory"] / MEBIBYTE, failed,
        ])  # fmt: skip
    return Table("All runs", columns, rows)


def accuracies(record: Cell) -> dict[str, float]:
    """The accuracy of each task, and their mean where there are several."""
    found = {task: metrics["acc"] for task, metrics in record.get("tasks", {}).items() if "acc" in metrics}
    return found | ({"mean accuracy": sum(found.values()) / len(found)} if len(found) > 1 else {})


def perplexity_bars(cells: Sequence[Cell], dense: float) -> list[Bars]:
    """Bars by density."""
    found = []
    for name, group in groups(cells).items():
        values = {label(cell): None if "error" in cell else cell["perplexity"]["perplexity"] for cell in group}
        found.append(Bars(f"Perplexity at {name}", "Lower is better.", "perplexity", values, ("dense", dense), True))
    return found


def along_axes(cells: Sequence[Cell], dense: float) -> list[Any]:
    """Perplexity over every axis of numbers that takes several values."""
    names = dict.fromkeys(name for cell in cells for name in cell["labels"])
    return [item for name in names for item in along(cells, name)]


def along(cells: Sequence[Cell], axis: str) -> list[Any]:
    """Perplexity over one axis, a line for each combination of the others; nothing where the axis is no number."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        value = number(cell["labels"].get(axis))
        if value is not None and (axis != "sparsity" or cell["labels"]["pattern"] == "unstructured"):
            place = "" if axis == "sparsity" or len(groups(cells)) == 1 else f", {density(cell)}"
            lines.setdefault(label(cell, [axis]) + place, []).append((value, cell["perplexity"]["perplexity"]))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return []
    series = [Series(name, [x for x, _ in points], [y for _, y in points]) for name, points in lines.items()]
    places = [x for line in series for x in line.x]
    wide = min(places) > 0 and max(places) / min(places) >= 8
    said = {"rebuild_ratio": "ratio α"}.get(axis, axis.replace("_", " "))
    title = f"Perplexity over {said}"
    kept = series[: len(LIGHT)]
    chart = Lines(title, "", said + (", log scale" if wide else ""), "perplexity, log scale", kept, wide, True)
    rest = f"Not drawn in “{title}”: {len(series) - len(kept)} more lines; the table has them."
    return [chart, *([rest] if len(kept) < len(series) else [])]


def number(value: Any) -> float | None:
    """A label as a number, where it is one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def tasks(cells: Sequence[Cell], dense: Mapping[str, Any]) -> list[Any]:
    """Every metric of every task, with its standard error."""
    rows: list[list[Value]] = []
    for name, record in [("dense", dense), *((f"{label(cell)}, {density(cell)}", cell) for cell in cells)]:
        for task, metrics in record.get("tasks", {}).items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr") and metric != "rows":
                    rows.append([name, task, metric, value, metrics.get(f"{metric}_stderr"), metrics.get("rows")])
    if not rows:
        return ["Not measured: the comparison has no tasks."]
    return [Table("Tasks", ["run", "task", "metric", "value", "standard error", "rows"], rows)]


def layer_errors(cells: Sequence[Cell]) -> list[Any]:
    """Error after the run by layer, both blocks added, of the first cells of each density."""
    found: list[Any] = []
    kinds = dict.fromkeys(map(error_of, cells))
    parted = [(kind, *item) for kind in kinds for item in groups([c for c in cells if error_of(c) == kind]).items()]
    for kind, name, group in parted:
        series = []
        for cell in group[: len(LIGHT)]:
            sums: dict[float, float] = {}
            for block in cell["report"]["blocks"]:
                sums[layer_of(block)] = sums.get(layer_of(block), 0.0) + block["error_after"]
            series.append(Series(label(cell), list(sums), list(sums.values())))
        note = "Attention and MLP added." + (f" The first {len(LIGHT)} runs." if len(group) > len(LIGHT) else "")
        title = f"Block error at {name}" + (f", {kind}" if len(kinds) > 1 else "")
        found.append(Lines(title, note, "decoder layer", "block error E, log scale", series,
                           log_y=True))  # fmt: skip
    return found or ["Not measured: no run has ended well."]


def error_of(cell: Cell) -> str:
    """What the block error of a cell is: errors of different kinds cannot be compared."""
    return str(cell["config"]["rebuild"].get("error", "absolute"))


def cost(cells: Sequence[Cell]) -> list[Any]:
    """Seconds and memory of every run."""
    names = [f"{label(cell)}, {density(cell)}" for cell in cells]
    if not cells:
        return ["Not measured: no run has ended well."]
    peaks = [cell["peak_memory"] / MEBIBYTE for cell in cells]
    return [
        Bars("Seconds", "Of pruning alone.", "seconds", dict(zip(names, [c["seconds"] for c in cells], strict=True))),
        Bars("Peak memory", "Of the whole process, or of the GPU.", "MiB", dict(zip(names, peaks, strict=True))),
    ]


def settings(content: Mapping[str, Any], cells: Sequence[Cell]) -> list[Table]:
    """Settings of the comparison, and every cell's own with its fingerprints."""
    keys = ("format_version", "status", "model", "software")
    rows: list[list[Value]] = [
        [cell["name"], cell.get("fingerprint"), mask_fingerprint(cell), calibration_fingerprint(cell)] for cell in cells
    ]
    return [
        settings_table("Comparison", {**{key: content[key] for key in keys}, **content["settings"]}),
        settings_table("What all runs have in common", content["base"]),
        Table("Fingerprints", ["run", "of settings and files", "of the masks", "of the calibration tokens"], rows),
        *(replace(settings_table(f"Settings of {cell['name']}", cell["config"]), folded=True) for cell in cells),
    ]  # fmt: skip


def mask_fingerprint(cell: Cell) -> str | None:
    """Of all masks of a cell."""
    from ...checkpoints.record import fingerprint_of

    modules = cell.get("record", {}).get("modules")
    return fingerprint_of({name: module["sha256"] for name, module in modules.items()}) if modules else None


def calibration_fingerprint(cell: Cell) -> str | None:
    """Of the calibration tokens."""
    found: str | None = cell.get("record", {}).get("calibration", {}).get("fingerprint")
    return found


def flat_rows(cells: Sequence[Cell], dense: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row a cell for CSV, the dense model first."""
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
    found: dict[str, object] = {"perplexity": record["perplexity"]["perplexity"]}
    for task, metrics in record.get("tasks", {}).items():
        found |= {f"{task}.{metric}": value for metric, value in metrics.items()}
    return found
