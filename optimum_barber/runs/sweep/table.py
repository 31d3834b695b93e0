"""A sweep's tables and pictures."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.errors import MissingExtraError
from ...base.files import csv_table, write_file
from ..report.cuts import curve_picture, error_picture

logger = logging.getLogger(__name__)
COLUMNS = (
    "scorer", "asked", "removed", "samples", "perplexity", "parameters", "macs_per_token", "prefill_seconds",
    "decode_seconds", "prefill_of_dense", "decode_of_dense",
)  # fmt: skip
HEADER = (
    "| scorer | asked | removed | samples | perplexity | parameters | MACs a token | prefill | decode |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
Cells = Mapping[str, Mapping[str, Any]]


def write_results(output: Path, cells: Cells, settings: Mapping[str, Any]) -> None:
    """Write `table.md`, `table.csv` and, with the extra `report`, the pictures."""
    rows = [row_of(name, result) for name, result in cells.items()]
    write_file(output / "table.csv", csv_table(rows, COLUMNS))
    write_file(output / "table.md", as_markdown(rows, cells, settings))
    try:
        pictures(output, rows, cells, settings)
    except MissingExtraError as error:
        logger.warning("%s", error)


def row_of(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of one cell; empty where nothing was measured."""
    after = result["after"]
    dense = result.get("before", after)  # the dense model, timed right before
    speeds: dict[str, Any] = {f"{kind}_{of}": "" for kind in ("prefill", "decode") for of in ("seconds", "of_dense")}
    for kind in ("prefill", "decode") if "latency" in after else ():
        seconds = after["latency"][kind]["median"]
        speeds |= {f"{kind}_seconds": seconds, f"{kind}_of_dense": seconds / dense["latency"][kind]["median"]}
    return {
        "scorer": result.get("scorer", name), "asked": result.get("asked", ""), "removed": result.get("removed", 0.0),
        "samples": result.get("samples", ""), "perplexity": result["perplexity"]["perplexity"],
        "parameters": after["parameters"], "macs_per_token": after["macs_per_token"], **speeds,
    }  # fmt: skip


def as_markdown(rows: list[dict[str, Any]], cells: Cells, settings: Mapping[str, Any]) -> str:
    """The rows for people, under what was measured and how."""
    lines = [f"# {settings['model']}", "", *protocol(cells, settings), "", HEADER]
    for row in rows:
        seconds = [
            f"{1000 * row[f'{kind}_seconds']:.1f} ms ({row[f'{kind}_of_dense']:.2f})" if row[f"{kind}_seconds"] else ""
            for kind in ("prefill", "decode")
        ]
        figures = [f"{row['perplexity']:.2f}", f"{row['parameters']:,}", f"{row['macs_per_token']:,.0f}", *seconds]
        lines.append(
            f"| {row['scorer']} | {row['asked']} | {row['removed']:.4f} | {row['samples']} | {' | '.join(figures)} |"
        )
    return "\n".join(lines) + "\n"


def protocol(cells: Cells, settings: Mapping[str, Any]) -> list[str]:
    """How perplexity and latency were measured."""
    dense = cells["dense"]
    found = dense["perplexity"]
    texts = ", ".join(settings["calibration"]) or "c4"
    lines = [
        f"Perplexity on {found['windows']} of {found['available']} windows of {found['sequence_length']} tokens of "
        f"{found['text']} ({found['split']} part), {found['dtype']}; calibrated on {texts}, seed {settings['seed']}."
    ]
    speed = dense["after"].get("latency")
    if speed:
        lines.append(
            f"Latency, median of {speed['repeats']} after {speed['warmup']}, once for every shape: prefill of "
            f"{speed['prompt']} tokens and one token decoded after them, batch {speed['batch']}, {speed['dtype']} on "
            f"{speed['device']}, {speed['threads']} threads; in brackets over the dense model's, timed right before."
        )
    return lines


def pictures(output: Path, rows: list[dict[str, Any]], cells: Cells, settings: Mapping[str, Any]) -> None:
    """Perplexity over the ratio, over the number of samples where there are several, and the errors at each ratio."""
    dense, cuts = rows[0]["perplexity"], rows[1:]
    most = max(settings["samples"])
    by_ratio = curves([row for row in cuts if row["samples"] == most], "scorer", "removed")
    curve_picture(output / "perplexity.png", by_ratio, dense, "share of attention and MLP removed")
    if len(set(settings["samples"])) > 1:
        for ratio in dict.fromkeys(settings["remove"]):
            by_samples = curves([row for row in cuts if row["asked"] == ratio], "scorer", "samples")
            name = f"perplexity-by-samples-{ratio:g}.png"
            curve_picture(output / name, by_samples, dense, f"calibration windows, {ratio:g} removed")
    for ratio in dict.fromkeys(settings["remove"]):
        chosen = {
            cell["scorer"]: cell for cell in cells.values() if cell.get("asked") == ratio and cell["samples"] == most
        }
        error_picture(output / f"errors-{ratio:g}.png", chosen, f"{ratio:g} of attention and MLP removed")


def curves(rows: list[dict[str, Any]], label: str, over: str) -> dict[str, list[tuple[float, float]]]:
    """Points (value of `over`, perplexity) in ascending order, by `label`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: float(row[over])):
        found.setdefault(row[label], []).append((row[over], row["perplexity"]))
    return found
