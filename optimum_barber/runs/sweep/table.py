"""A sweep's tables and pictures."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.errors import MissingExtraError
from ...base.files import csv_table, markdown_table, write_file
from ..cells import DENSE
from ..report.block_charts import curve_picture, error_picture

logger = logging.getLogger(__name__)
COLUMNS = (
    "scorer", "asked", "removed", "samples", "perplexity", "parameters", "macs_per_token", "prefill_seconds",
    "decode_seconds", "prefill_of_dense", "decode_of_dense",
)  # fmt: skip
Cells = Mapping[str, Mapping[str, Any]]
Row = dict[str, Any]


def write_results(output: Path, cells: Cells, settings: Mapping[str, Any]) -> None:
    """Write `table.md`, `table.csv` and, with the extra `report`, the pictures."""
    rows = figures_of(cells)
    text = [f"# {settings['model']}", "", *_protocol(cells[DENSE], settings), ""]
    figures = [_rounded(row) for row in rows]
    text.append(markdown_table(figures, list(figures[0])))
    write_file(output / "table.csv", csv_table(rows, COLUMNS))
    write_file(output / "table.md", "\n".join(text) + "\n")
    try:
        _perplexity_pictures(output, rows[0]["perplexity"], rows[1:], settings)
        _error_pictures(output, cells, settings)
    except MissingExtraError as error:
        logger.warning("%s", error)


def figures_of(cells: Cells) -> list[Row]:
    """Return the columns of every cell, unrounded."""
    return [_row_of(name, result) for name, result in cells.items()]


def _row_of(name: str, result: Mapping[str, Any]) -> Row:
    """Return the columns of one cell, unrounded; empty where nothing was measured."""
    after = result["after"]
    row = dict.fromkeys(COLUMNS, "") | {
        "scorer": result.get("scorer", name), "asked": result.get("asked", ""), "removed": result.get("removed", 0.0),
        "samples": result.get("samples", ""), "perplexity": result["perplexity"]["perplexity"],
        "parameters": after["parameters"], "macs_per_token": after["macs_per_token"],
    }  # fmt: skip
    if "latency" in after:
        dense = result.get("before", after)  # the dense model, timed right before
        for kind in ("prefill", "decode"):
            seconds = after["latency"][kind]["median"]
            row[f"{kind}_seconds"] = seconds
            row[f"{kind}_of_dense"] = seconds / dense["latency"][kind]["median"]
    return row


def _rounded(row: Row) -> dict[str, str]:
    columns = {
        "scorer": row["scorer"], "asked": row["asked"], "removed": f"{row['removed']:.4f}", "samples": row["samples"],
        "perplexity": f"{row['perplexity']:.2f}", "parameters": f"{row['parameters']:,}",
        "MACs a token": f"{row['macs_per_token']:,.0f}", "prefill": "", "decode": "",
    }  # fmt: skip
    for kind in ("prefill", "decode"):
        if row[f"{kind}_seconds"]:
            columns[kind] = f"{1000 * row[f'{kind}_seconds']:.1f} ms ({row[f'{kind}_of_dense']:.2f})"
    return columns


def _protocol(dense: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    measured = dense["perplexity"]
    texts = ", ".join(settings["calibration"]["texts"]) or "c4"
    lines = [
        f"Perplexity on {measured['windows']} of {measured['available']} windows of {measured['sequence_length']} "
        f"tokens of {measured['text']} ({measured['split']} part), {measured['dtype']}; calibrated on {texts}, "
        f"seed {settings['seed']}."
    ]
    speed = dense["after"].get("latency")
    if speed:
        lines.append(
            f"Latency, median of {speed['repeats']} after {speed['warmup']}, once for every shape: prefill of "
            f"{speed['prompt']} tokens and one token decoded after them, batch {speed['batch']}, {speed['dtype']} on "
            f"{speed['device']}, {speed['threads']} threads; in brackets over the dense model's, timed right before."
        )
    return lines


def _perplexity_pictures(output: Path, dense: float, cuts: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Draw perplexity over the ratio, and over the number of samples where there are several."""
    most = max(settings["samples"])
    by_ratio = _curves([row for row in cuts if row["samples"] == most], "removed")
    curve_picture(output / "perplexity.png", by_ratio, dense, "share of attention and MLP removed")
    if len(set(settings["samples"])) == 1:
        return
    for ratio in dict.fromkeys(settings["remove"]):
        by_samples = _curves([row for row in cuts if row["asked"] == ratio], "samples")
        path = output / f"perplexity-by-samples-{ratio:g}.png"
        curve_picture(path, by_samples, dense, f"calibration windows, {ratio:g} removed")


def _error_pictures(output: Path, cells: Cells, settings: Mapping[str, Any]) -> None:
    """Draw the errors at each ratio, with most samples."""
    most = max(settings["samples"])
    for ratio in dict.fromkeys(settings["remove"]):
        reports = {}
        for cell in cells.values():
            if cell.get("asked") == ratio and cell["samples"] == most:
                reports[cell["scorer"]] = cell
        error_picture(output / f"errors-{ratio:g}.png", reports, f"{ratio:g} of attention and MLP removed")


def _curves(rows: Sequence[Row], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Return points (value of `axis`, perplexity) in ascending order, by scorer."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: float(row[axis])):
        points.setdefault(row["scorer"], []).append((row[axis], row["perplexity"]))
    return points
