"""Pictures of structured pruning: perplexity over the share removed, and the errors that the cuts cause."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .pictures import pyplot
from .style import LIGHT, MARKERS


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
    plot = pyplot()
    figure, axes = plot.subplots(figsize=(6.5, 4.5), layout="constrained")
    for index, (label, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), label=label, **_look(index))
    axes.axhline(dense, color=LIGHT[6], linestyle="--", linewidth=1, label=f"dense {dense:.1f}")
    axes.set_yscale("log")
    axes.set_xlabel(over)
    axes.set_ylabel("perplexity (log scale)")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plot.close(figure)


def error_picture(path: Path, reports: Mapping[str, Mapping[str, Any]], title: str = "") -> None:
    """The error that cuts cause: of each attention and MLP block alone, and of each decoder layer's output.

    Args:
        path: of the picture; its suffix decides the format.
        reports: by label, such as the scorer, the `report.json` of a shrunk model.
        title: above the picture.
    """
    plot = pyplot()
    figure, panels = plot.subplots(1, 3, figsize=(13, 4), sharex=True, layout="constrained")
    for index, (label, report) in enumerate(reports.items()):
        blocks = [[b["error"] for b in report["blocks"] if b["block"].endswith(kind)] for kind in ("attention", "mlp")]
        for axes, errors in zip(panels, [*blocks, report["layer_errors"]], strict=True):
            axes.plot(range(len(errors)), errors, label=label, **_look(index))
    names = ("attention alone", "MLP alone", "decoder layer's output, the layers before it cut too")
    for axes, name in zip(panels, names, strict=True):
        if any(y > 0 for line in axes.lines for y in line.get_ydata()):  # no head may have gone
            axes.set_yscale("log")
        axes.set_xlabel("decoder layer")
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("relative squared error (log scale)")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plot.close(figure)


def _look(index: int) -> dict[str, Any]:
    """Colour, marker and line of a curve, which differ in grey too."""
    style = "-" if index < len(LIGHT) else "--"
    return {
        "color": LIGHT[index % len(LIGHT)], "marker": MARKERS[index % len(MARKERS)], "linestyle": style,
        "markersize": 4, "linewidth": 1.2,
    }  # fmt: skip
