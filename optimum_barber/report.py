"""Pictures of results. Needs the extra `report`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import MissingExtraError

DENSE, PLAIN, REBUILT = "#4d4d4d", "#e69f00", "#0072b2"  # tell apart in grey and for the colour-blind


CYCLE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")  # Okabe and Ito's
MARKERS = "osD^vP*"


def pyplot() -> Any:
    """Matplotlib, drawing into files.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plots
    except ImportError:
        raise MissingExtraError("a picture", "report") from None
    return plots


def picture(
    path: Path,
    perplexities: Mapping[str, Mapping[str, float]],
    dense: float,
    blocks: Sequence[Mapping[str, Any]],
    title: str,
) -> None:
    """Perplexity bars beside the dense line, and the block error before and after by layer.

    Args:
        path: of the picture; its suffix decides the format.
        perplexities: by producer, then by "without" and "with" rebuild.
        dense: perplexity of the dense model.
        blocks: the blocks of one run's `report.json`.
        title: above the picture.
    """
    plots = pyplot()
    figure, (bars, errors) = plots.subplots(1, 2, figsize=(11, 4), width_ratios=[1, 1.6], layout="constrained")
    _bars(bars, perplexities, dense)
    _errors(errors, blocks)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plots.close(figure)


def _bars(axes: Any, perplexities: Mapping[str, Mapping[str, float]], dense: float) -> None:
    for index, values in enumerate(perplexities.values()):
        for offset, key, colour in ((-0.2, "without", PLAIN), (0.2, "with", REBUILT)):
            bar = axes.bar(
                index + offset, values[key], 0.38, color=colour, label=f"{key} rebuild" if not index else None
            )
            axes.bar_label(bar, fmt="%.1f", fontsize=8)
    axes.axhline(dense, color=DENSE, linestyle="--", linewidth=1, label=f"dense {dense:.1f}")
    axes.set_xticks(range(len(perplexities)), list(perplexities))
    axes.set_yscale("log")
    axes.set_ylabel("perplexity (log scale)")
    axes.legend(fontsize=8)


def _errors(axes: Any, blocks: Sequence[Mapping[str, Any]]) -> None:
    """The block error before and after, by layer."""
    for kind, marker in (("attention", "o"), ("mlp", "s")):
        chosen = [block for block in blocks if block["block"].endswith(kind)]
        layers = range(len(chosen))
        for key, colour, style in (("error_before", PLAIN, "--"), ("error_after", REBUILT, "-")):
            values = [block[key] for block in chosen]
            label = f"{kind}, {key.removeprefix('error_')} rebuild"
            axes.plot(layers, values, style, color=colour, marker=marker, markersize=3, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("block error E (log scale)")
    axes.legend(fontsize=8)


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
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(6.5, 4.5), layout="constrained")
    for index, (label, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), label=label, **_look(index))
    axes.axhline(dense, color=DENSE, linestyle="--", linewidth=1, label=f"dense {dense:.1f}")
    axes.set_yscale("log")
    axes.set_xlabel(over)
    axes.set_ylabel("perplexity (log scale)")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plots.close(figure)


def error_picture(path: Path, reports: Mapping[str, Mapping[str, Any]], title: str = "") -> None:
    """The error that cuts cause: of each attention and MLP block alone, and of each decoder layer's output.

    Args:
        path: of the picture; its suffix decides the format.
        reports: by label, such as the scorer, the `report.json` of a shrunk model.
        title: above the picture.
    """
    plots = pyplot()
    figure, panels = plots.subplots(1, 3, figsize=(13, 4), sharex=True, layout="constrained")
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
    plots.close(figure)


def _look(index: int) -> dict[str, Any]:
    """Colour, marker and line of a curve, which differ in grey too."""
    style = "-" if index < len(CYCLE) else "--"
    return {
        "color": CYCLE[index % len(CYCLE)], "marker": MARKERS[index % len(MARKERS)], "linestyle": style,
        "markersize": 4, "linewidth": 1.2,
    }  # fmt: skip
