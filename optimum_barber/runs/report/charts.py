"""The one renderer of charts: by matplotlib, as inline SVG for a page or as a picture. Needs the extra `report`."""

import importlib.util
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...base.errors import MissingExtraError
from ...base.files import write_file
from .page import Bars, Chart, Heat, Lines

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#4d4d4d", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
PAPER = {"color": "white", "pad": 0.5}  # behind text that a line may cross
REFERENCE = {"color": "black", "linestyle": "--", "linewidth": 1}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d0d0d0",
    "grid.linewidth": 0.5,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
WIDTH, HEIGHT, ROW = 4.0, 2.5, 0.19  # inches: of a chart, of its axes, of a row of the legend
LONGEST = 38  # letters of a name in a chart; the chart's table has it in full


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_drawing(feature: str) -> None:
    """Raise `MissingExtraError`, which names the feature, where matplotlib is not installed."""
    if not can_draw():
        raise MissingExtraError(feature, "report")


def svg(chart: Chart, name: str) -> str:
    """The chart as one <svg> element without styles or addresses; its ids depend on `name`, unique in its page."""
    file = io.BytesIO()
    with _style(name):
        _figure([chart]).savefig(file, format="svg", metadata=NO_METADATA)
    return _inline(file.getvalue(), chart.in_words())


def save(path: Path, charts: Sequence[Chart], title: str = "") -> None:
    """Draw charts side by side, each under its title, into one file; its suffix decides the format.

    Raises:
        BarberError: matplotlib is not installed, or the file cannot be written.
    """
    check_drawing("a picture")
    picture = io.BytesIO()
    with _style(path.name):
        figure = _figure(charts, titled=True)
        if title:
            figure.suptitle(title, fontsize=10)
        figure.savefig(picture, format=path.suffix[1:], dpi=200)
    write_file(path, picture.getvalue())


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Context manager: the same look on every machine, and ids that depend on `salt` alone."""
    from matplotlib import style

    with style.context(["default", {**STYLE, "svg.hashsalt": salt}]):
        yield


def _inline(source: bytes, label: str) -> str:
    """The <svg> element of a file, made fit for a page that holds several."""
    root = ElementTree.fromstring(source)
    for definitions in root.findall("{*}defs"):
        if definitions.find("{*}style") is not None:  # it would hold for the whole page, whose own says the same
            root.remove(definitions)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
    targets = {element.get("href") for element in root.iter()}
    for element in root.iter():
        if f"#{element.get('id')}" not in targets:
            element.attrib.pop("id", None)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace, as HTML writes it."""
    return name.rpartition("}")[2]


def _figure(charts: Sequence[Chart], titled: bool = False) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    heights = []
    for panel, chart in zip(figure.subfigures(1, len(charts), squeeze=False)[0], charts, strict=True):
        heights.append(DRAW[type(chart)](panel.subplots(), chart))
        if titled:
            panel.suptitle(_clipped(chart.title), fontsize=10)
    figure.set_size_inches(WIDTH * len(charts), max(heights) + 0.3 * titled)
    for artist in figure.findobj():
        artist.set_clip_on(False)  # clip paths would need addresses in the page
    return figure


def _draw_lines(axes: Any, chart: Lines) -> float:
    """Draw lines and return the height in inches that they need."""
    for index, series in enumerate(chart.series):
        if chart.stepped:
            axes.stairs(series.y, series.x, color=COLOURS[index], label=series.name, fill=True, alpha=0.6)
            continue
        turn = index // len(COLOURS)  # beyond eight series colours and markers come again, with other dashes
        axes.plot(
            series.x, series.y, label=_clipped(series.name), color=COLOURS[index % len(COLOURS)], linewidth=1.2,
            marker=MARKERS[index % len(MARKERS)], markersize=3.5, linestyle=DASHES[(index + turn) % len(DASHES)],
        )  # fmt: skip
    for place, name in chart.marks:
        axes.axvline(place, label=_clipped(name), **REFERENCE)
    if chart.reference:
        name, value = chart.reference
        axes.axhline(value, label=_clipped(f"{name} {value:.4g}"), **REFERENCE)
    places: list[float] = []
    values: list[float] = []
    for series in chart.series:
        places += series.x
        values += [y for y in series.y if y is not None]
    _scale(axes.xaxis, chart.log_x, places)
    _scale(axes.yaxis, chart.log_y, values)
    if not chart.log_y:
        axes.set_ylim(bottom=min([0.0, *values]))
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.grid()
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) < 2:
        return HEIGHT
    axes.legend(loc="lower left", bbox_to_anchor=(-0.15, 1), frameon=False, handlelength=3)  # above, hides no line
    return HEIGHT + ROW * len(labels)


def _scale(axis: Any, log: bool, values: Sequence[float]) -> None:
    """Scale and ticks of an axis; logarithmic only where there is something to show on it."""
    from matplotlib import ticker

    positive = [value for value in values if value > 0]
    locator: Any = ticker.MaxNLocator(5, integer=all(float(value).is_integer() for value in values))
    if log and positive:
        set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
        set_scale("log", nonpositive="mask")
        span = max(positive) / min(positive)
        if span >= 1000:
            locator = ticker.LogLocator(numticks=6)
        elif span >= 8:
            locator = ticker.LogLocator(subs=(1, 2, 5))
        else:
            locator = ticker.MaxNLocator(4)
    axis.set_major_locator(locator)
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter("{x:.6g}")


def _draw_bars(axes: Any, chart: Bars) -> float:
    numbers = [value for value in chart.values.values() if value is not None]
    if chart.reference:
        numbers.append(chart.reference[1])
    low = min(numbers, default=1.0) / 1.5 if chart.log else 0.0
    for row, (name, value) in enumerate(chart.values.items()):
        end = low if value is None else value
        axes.barh(row, end - low, left=low, height=0.36, color=COLOURS[0])
        figure = "failed" if value is None else f"{value:.4g}"
        axes.annotate(figure, (end, row), (3, 0), textcoords="offset points", va="center", bbox=PAPER)
        axes.annotate(
            _clipped(name), (0, row - 0.24), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="bottom", bbox=PAPER,
        )  # fmt: skip
    if chart.reference:
        name, value = chart.reference
        axes.axvline(value, **REFERENCE)
        axes.set_title(f"{name} {value:.4g} (dashed line)", loc="left", fontsize=9)
    _scale(axes.xaxis, chart.log, [low, *numbers])
    axes.set_xlim(left=low)
    axes.set_ylim(len(chart.values) - 0.7, -0.8)
    axes.yaxis.set_visible(False)
    axes.set_xlabel(chart.unit + (", log scale" if chart.log else ""))
    return 0.8 + 0.4 * len(chart.values)


def _draw_heat(axes: Any, chart: Heat) -> float:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["cividis_r"]  # in one order of brightness for every eye, dark for 1
    for row, values in enumerate(chart.values):
        for column, value in enumerate(values):
            if value is not None:
                place = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(place, 1, 1, color=colours(value), linewidth=0))
                ink = "white" if value > 0.55 else "black"
                axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(chart.columns)), [_clipped(name, 12) for name in chart.columns])
    axes.set_yticks(range(len(chart.rows)), list(map(_clipped, chart.rows)))
    axes.set_xlim(-0.5, len(chart.columns) - 0.5)
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return 0.5 + 0.18 * len(chart.rows)


def _clipped(name: str, letters: int = LONGEST) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


DRAW: dict[type[Chart], Any] = {Lines: _draw_lines, Bars: _draw_bars, Heat: _draw_heat}
