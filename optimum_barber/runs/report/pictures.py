"""Charts as pictures, by matplotlib. Needs the extra `report`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.errors import MissingExtraError
from .block_charts import errors
from .page import Bars, Chart, Heat, Lines, Series
from .style import DASHES, LIGHT, MARKERS, level


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as found
    except ImportError:
        raise MissingExtraError("a picture", "report") from None
    return found


def write_pictures(directory: Path, charts: Sequence[Chart]) -> list[Path]:
    """One PNG a chart, numbered in the page's order."""
    plot, written = pyplot(), []
    for number, chart in enumerate(charts, 1):
        height = max(3.6, 0.2 * len(chart.rows)) if isinstance(chart, Heat) else 3.6
        figure, axes = plot.subplots(figsize=(6.4, height), layout="constrained")
        draw(axes, chart)
        axes.set_title(chart.title, fontsize=10)
        path = directory / f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', chart.title.lower()).strip('-')}.png"
        figure.savefig(path, dpi=150)
        plot.close(figure)
        written.append(path)
    return written


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
    plot = pyplot()
    values = {f"{name}, {key} rebuild": found[key] for name, found in perplexities.items() for key in found}
    figure, (left, right) = plot.subplots(1, 2, figsize=(11, 4), width_ratios=[1, 1.6], layout="constrained")
    draw(left, Bars("", "", "perplexity", values, ("dense", dense), log=True))
    draw(right, errors(blocks))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plot.close(figure)


def draw(axes: Any, chart: Chart) -> None:
    """Draw a chart into matplotlib's axes."""
    if isinstance(chart, Lines):
        _lines(axes, chart)
    elif isinstance(chart, Bars):
        _bars(axes, chart)
    elif isinstance(chart, Heat):
        _heat(axes, chart)


def _lines(axes: Any, chart: Lines) -> None:
    for index, series in enumerate(chart.series):
        _line(axes, series, index, chart.stepped)
    for place, name in chart.marks:
        axes.axvline(place, color="black", linestyle="--", linewidth=1, label=name)
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.grid(linewidth=0.3)
    if len(chart.series) > 1 or chart.marks:
        axes.legend(fontsize=8)


def _line(axes: Any, series: Series, index: int, stepped: bool) -> None:
    if stepped:
        axes.stairs(series.y, series.x, color=LIGHT[index], label=series.name, fill=True, alpha=0.6)
        return
    y = [float("nan") if value is None else value for value in series.y]
    dash = (0, tuple(map(float, DASHES[index].split()))) if DASHES[index] else "-"
    axes.plot(
        series.x, y, linestyle=dash, marker=MARKERS[index], markersize=3.5, linewidth=1, color=LIGHT[index],
        label=series.name,
    )  # fmt: skip


def _bars(axes: Any, chart: Bars) -> None:
    names = list(chart.values)[::-1]
    drawn = axes.barh(range(len(names)), [chart.values[name] or 0 for name in names], color=LIGHT[0])
    labels = ["failed" if chart.values[name] is None else f"{chart.values[name]:.4g}" for name in names]
    axes.bar_label(drawn, labels, fontsize=8, padding=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xscale("log" if chart.log else "linear")
    axes.xaxis.set_minor_formatter("")  # the labels between powers of ten would lie over each other
    axes.set_xlabel(chart.unit + (", log scale" if chart.log else ""))
    axes.margins(x=0.15)
    if chart.reference:
        name, value = chart.reference
        axes.axvline(value, color="black", linestyle="--", linewidth=1, label=f"{name} {value:.4g}")
        axes.legend(fontsize=8)


def _heat(axes: Any, chart: Heat) -> None:
    for row, values in enumerate(chart.values):
        for column, value in enumerate(values):
            if value is not None:
                fill, ink = level(value)
                axes.add_patch(_square(column, row, fill))
                axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_xticks(range(len(chart.columns)), chart.columns, fontsize=8)
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=7)
    axes.set_xlim(-0.5, len(chart.columns) - 0.5)
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)


def _square(column: int, row: int, fill: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, color=fill, linewidth=0)
