"""Charts as inline SVG: 360 wide, so that text stays readable on a phone; colours come from the page's style."""

from collections.abc import Sequence
from html import escape

from .page import Bars, Chart, Heat, Lines, Series, plainly
from .scale import Scale, tick_label
from .style import DASHES, MARKERS, SHAPES, level

WIDTH = 360
LEFT, RIGHT = 50, 350
LETTER = 6.2  # width of a letter in the legend, on average
ROW = 15
LONGEST = 50  # letters of a name


def svg(chart: Chart) -> str:
    """The chart as one <svg> element, with its description for those who cannot see it."""
    draw = {Lines: lines, Bars: bars, Heat: heat}[type(chart)]
    height, body = draw(chart)  # type: ignore[operator]
    label = escape(f"{chart.title}. {describe(chart)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">{body}</svg>'


def describe(chart: Chart) -> str:
    """The chart in words: what lies between what."""
    if isinstance(chart, Lines):
        said = [f"{s.name}: {_span(s.y)}" for s in chart.series]
        return f"{chart.y} over {chart.x}. {'; '.join(said)}" + "".join(f"; {name}" for _, name in chart.marks)
    if isinstance(chart, Bars):
        reference = [f"{chart.reference[0]} {plainly(chart.reference[1])}"] if chart.reference else []
        return "; ".join([*reference, *(f"{name} {plainly(value)}" for name, value in chart.values.items())])
    if isinstance(chart, Heat):
        return f"{len(chart.rows)} rows and {len(chart.columns)} columns: {_span([v for r in chart.values for v in r])}"
    return chart.note


def _span(values: Sequence[float | None]) -> str:
    held = [value for value in values if value is not None]
    return f"from {plainly(min(held))} to {plainly(max(held))}" if held else "nothing"


def clipped(name: str, letters: int) -> str:
    """A name that fits; the table below the chart has it in full."""
    return name if len(name) <= letters else name[: max(letters - 1, 1)] + "…"


def text(x: float, y: float, content: str, anchor: str = "start", extra: str = "") -> str:
    """A piece of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'


def lines(chart: Lines) -> tuple[float, str]:
    """Height and content of a line chart: legend, axes, marks, series."""
    legend, top = _legend([series.name for series in chart.series])
    bottom = top + 170
    across = [x for series in chart.series for x in series.x] + [x for x, _ in chart.marks]
    along = [y for series in chart.series for y in series.y if y is not None]
    x = Scale.over(across, LEFT + 4, RIGHT - 6, chart.log_x)
    y = Scale.over(along, bottom, top + 8, chart.log_y, zero=not chart.log_y)
    whole = not chart.log_x and all(float(place).is_integer() for place in across)
    parts = [legend, _axes(x, y, top, bottom, whole), text((LEFT + RIGHT) / 2, bottom + 32, chart.x, "middle")]
    parts.append(text(4, top - 2, chart.y))
    for index, (place, name) in enumerate(chart.marks):
        at = x.place(place)
        anchor = "end" if at > (LEFT + RIGHT) / 2 else "start"
        parts.append(f'<path class="mark" d="M{at:.1f} {top + 4}V{bottom}"/>')
        parts.append(text(at - 4 if anchor == "end" else at + 4, top + 16 + ROW * index, name, anchor))
    parts += [_series(series, index, x, y, chart.stepped) for index, series in enumerate(chart.series)]
    return bottom + 40, "".join(parts)


def _series(series: Series, index: int, x: Scale, y: Scale, stepped: bool) -> str:
    """One line with its markers; gaps where a value is missing."""
    points = [
        (x.place(a), y.place(b) if b is not None and (b > 0 or not y.log) else None)
        for a, b in zip(series.x, series.y, strict=False)
    ]
    ends = [x.place(a) for a in series.x[1:]]
    path, down = "", False
    for number, (a, b) in enumerate(points):
        if b is None:
            down = False
            continue
        path += f"{'L' if down else 'M'}{a:.1f} {b:.1f}" + (f"H{ends[number]:.1f}" if stepped else "")
        down = True
    dash = f' stroke-dasharray="{DASHES[index]}"' if DASHES[index] else ""
    drawn = f'<path class="line s{index}" d="{path}"{dash}/>'
    return drawn + "" if stepped else drawn + "".join(_marker(index, a, b) for a, b in points if b is not None)


def _marker(index: int, x: float, y: float) -> str:
    return f'<path class="dot f{index}" transform="translate({x:.1f} {y:.1f})" d="{SHAPES[MARKERS[index]]}"/>'


def _legend(names: Sequence[str]) -> tuple[str, float]:
    """The legend, and where the chart below it begins; a single line needs none."""
    if len(names) < 2:
        return "", 18.0
    parts, x, y = [], 4.0, 10.0
    for index, name in enumerate(clipped(name, LONGEST) for name in names):
        width = 32 + LETTER * len(name)
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + ROW
        dash = f' stroke-dasharray="{DASHES[index]}"' if DASHES[index] else ""
        parts.append(f'<path class="line s{index}" d="M{x:.1f} {y:.1f}h20"{dash}/>{_marker(index, x + 10, y)}')
        parts.append(text(x + 24, y + 4, name))
        x += width + 8
    return "".join(parts), y + 24


def _axes(x: Scale, y: Scale, top: float, bottom: float, whole: bool) -> str:
    """Frame, grid and tick labels; an x axis of `whole` numbers is labelled with such only."""
    parts = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(
            f'<path class="grid" d="M{LEFT} {at:.1f}H{RIGHT}"/>{text(LEFT - 5, at + 4, tick_label(value), "end")}'
        )
    for value in (tick for tick in x.ticks() if not whole or tick.is_integer()):
        at = x.place(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {top + 4:.1f}V{bottom}"/>')
        parts.append(text(at, bottom + 15, tick_label(value), "middle"))
    return "".join([*parts, f'<path class="axis" d="M{LEFT} {top + 4:.1f}V{bottom}H{RIGHT}"/>'])


def bars(chart: Bars) -> tuple[float, str]:
    """Height and content of a bar chart: a name above each bar, its value behind it."""
    held = [value for value in chart.values.values() if value is not None]
    reference = [chart.reference[1]] if chart.reference else []
    across = [*held, *reference]
    low = [min(across) / 1.5] if chart.log and across else []
    x = Scale.over([*across, *low], 4, 290, chart.log, zero=not chart.log)
    parts, top = [], 20.0 if chart.reference else 4.0
    y = top
    for name, value in chart.values.items():
        parts.append(text(4, y + 11, clipped(name, LONGEST)))
        length = 0.0 if value is None else max(x.place(value) - 4, 1.0)
        parts.append(f'<rect class="bar" x="4" y="{y + 15:.1f}" width="{length:.1f}" height="12"/>')
        parts.append(text(8 + length, y + 25, "failed" if value is None else f"{value:.4g}"))
        y += 34
    if chart.reference:
        at = x.place(chart.reference[1])
        parts.append(text(4, 12, f"{chart.reference[0]} {plainly(chart.reference[1])} (dashed line)"))
        parts.append(f'<path class="mark" d="M{at:.1f} {top}V{y:.1f}"/>')
    parts.append(text(4, y + 12, f"{chart.unit}{', log scale' if chart.log else ''}"))
    return y + 18, "".join(parts)


def heat(chart: Heat) -> tuple[float, str]:
    """Height and content of a heat map: per cent in every cell."""
    left, top, height = 30, 22, 15
    width = (RIGHT - left) / max(len(chart.columns), 1)
    letters = max(int(width / LETTER), 1)
    parts = [
        text(left + width * (index + 0.5), 14, clipped(name, letters), "middle")
        for index, name in enumerate(chart.columns)
    ]
    for row, (name, values) in enumerate(zip(chart.rows, chart.values, strict=True)):
        y = top + row * height
        parts.append(text(left - 4, y + 11, name, "end"))
        for column, value in enumerate(values):
            if value is not None:
                fill, ink = level(value)
                x = left + column * width
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{fill}"/>')
                parts.append(
                    text(x + width / 2, y + 11, f"{100 * value:.1f}", "middle", f' class="on" style="fill:{ink}"')
                )
    return top + len(chart.rows) * height + 6, "".join(parts)
