"""Pictures of structured pruning: perplexity over the share removed, and the errors that the cuts cause."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import save
from .page import Lines, Series

PANELS = ("attention alone", "MLP alone", "layer's output, earlier cuts included")


def curve_picture(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], dense: float, over: str, title: str = ""
) -> None:
    """Perplexity as curves beside the dense line.

    Args:
        path: of the picture; its suffix decides the format.
        curves: by label, points (x, perplexity).
        dense: perplexity of the dense model.
        over: what x is.
        title: above the picture.
    """
    series = [Series.through(label, points) for label, points in curves.items()]
    chart = Lines("Perplexity", "", over, "perplexity, log scale", series, log_y=True, reference=("dense", dense))
    save(path, [chart], title)


def error_picture(path: Path, reports: Mapping[str, Mapping[str, Any]], title: str = "") -> None:
    """The error that cuts cause: of each attention and MLP block alone, and of each decoder layer's output.

    Args:
        path: of the picture; its suffix decides the format.
        reports: by label, such as the scorer, the `report.json` of a shrunk model.
        title: above the picture.
    """
    panels: dict[str, list[Series]] = {name: [] for name in PANELS}
    for label, report in reports.items():
        curves = (_errors(report, "attention"), _errors(report, "mlp"), report["layer_errors"])
        for series, errors in zip(panels.values(), curves, strict=True):
            series.append(Series(label, list(range(len(errors))), errors))
    charts = []
    for name, series in panels.items():
        charts.append(Lines(name, "", "decoder layer", "relative squared error, log scale", series, log_y=True))
    save(path, charts, title)


def _errors(report: Mapping[str, Any], kind: str) -> list[float]:
    return [block["error"] for block in report["blocks"] if block["block"].endswith(kind)]
