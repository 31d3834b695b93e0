"""A page as data: texts, tables and charts in sections, before anything is drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | None
Rows = list[list[Value]]
MOST_SERIES = 8  # lines in one chart; more cannot be told apart


@dataclass
class Table:
    """Rows with a value for every column, None where there is none; a folded table is shown on request."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    folded: bool = False


@dataclass
class Series:
    """One line of a chart: `x` and `y` of the same length; y is None where there is nothing to draw."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]

    @classmethod
    def through(cls, name: str, points: Iterable[tuple[float, float]]) -> "Series":
        """The line through points (x, y)."""
        x, y = zip(*points, strict=True)
        return cls(name, x, y)


@dataclass
class Chart:
    """The title of a chart, and a note on how to read it."""

    title: str
    note: str

    def table(self) -> Table:
        """The chart's numbers, folded."""
        raise NotImplementedError

    def in_words(self) -> str:
        """A description for readers who cannot see the chart: the range of each column of its table."""
        table = self.table()
        parts = [f"{self.title}, {len(table.rows)} rows of {table.columns[0] or 'numbers'}"]
        for place, name in enumerate(table.columns[1:], 1):
            values = [row[place] for row in table.rows]
            numbers = [value for value in values if isinstance(value, int | float)]
            if numbers:
                parts.append(f"{name} from {as_text(min(numbers))} to {as_text(max(numbers))}")
        return "; ".join(parts)


@dataclass
class Lines(Chart):
    """Lines over a common axis.

    Attributes:
        x: name of the axis.
        y: name of the axis.
        series: at most `MOST_SERIES` on a page.
        marks: places on the x axis that are marked, with a label each.
        stepped: a histogram: each value holds up to the next x, and there is one x more than values.
        reference: name and value of a horizontal line to compare with.
    """

    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[tuple[float, str]] = ()
    stepped: bool = False
    reference: tuple[str, float] | None = None

    def table(self) -> Table:
        """One row for each x, one column for each series."""
        places: dict[float, list[Value]] = {}
        for column, series in enumerate(self.series):
            for x in series.x:
                places.setdefault(x, [x] + [None] * len(self.series))
            for x, y in zip(series.x, series.y, strict=False):
                places[x][column + 1] = y
        rows = [places[x] for x in sorted(places)]
        return Table(self.title, [self.x, *(series.name for series in self.series)], rows, folded=True)


@dataclass
class Bars(Chart):
    """One bar for each name; a value is None where it failed; `reference` is a line to compare with."""

    unit: str
    values: Mapping[str, float | None]
    reference: tuple[str, float] | None = None
    log: bool = False

    def table(self) -> Table:
        """One row for each bar, the reference first."""
        rows: Rows = [list(self.reference)] if self.reference else []
        rows += map(list, self.values.items())
        return Table(self.title, ["", self.unit], rows, folded=True)


@dataclass
class Heat(Chart):
    """A matrix of shares in [0, 1], each written into its cell in per cent; None where there is nothing."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]

    def table(self) -> Table:
        """The matrix."""
        rows = [[name, *values] for name, values in zip(self.rows, self.values, strict=True)]
        return Table(self.title, ["", *self.columns], rows, folded=True)


@dataclass
class Section:
    """A heading and what stands under it: texts, tables, charts, and sections one level deeper."""

    title: str
    items: list[Any] = field(default_factory=list)


@dataclass
class Page:
    """A whole report; the summary is one sentence or two."""

    title: str
    summary: str
    sections: list[Section] = field(default_factory=list)


def charts_in(items: Iterable[Any]) -> list[Chart]:
    """All charts in order, those of sections within included."""
    charts: list[Chart] = []
    for item in items:
        if isinstance(item, Section):
            charts += charts_in(item.items)
        elif isinstance(item, Chart):
            charts.append(item)
    return charts


def as_text(value: Value) -> str:
    """A count in full, any other number to six digits, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value


def grouped(items: Iterable[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    """Items by key, in the order of their first appearance."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def flattened(content: Any, prefix: str = "") -> dict[str, Value]:
    """Nested settings as one level; lists of plain values in one cell, a switch as yes or no."""
    if isinstance(content, list | tuple):
        nested = any(isinstance(item, Mapping | list) for item in content)
        content = dict(enumerate(content, 1)) if nested else ", ".join(map(str, content)) or None
    if isinstance(content, Mapping):
        flat: dict[str, Value] = {}
        for key, value in content.items():
            flat |= flattened(value, f"{prefix}{key}.")
        return flat
    if isinstance(content, bool):
        content = "yes" if content else "no"
    return {prefix[:-1]: content if isinstance(content, int | float | str) else None}


def settings_table(title: str, content: Mapping[str, Any], folded: bool = False) -> Table:
    """One row for each setting."""
    rows: Rows = []
    for name, value in flattened(content).items():
        rows.append([name, None if value is None else str(value)])
    return Table(title, ["setting", "value"], rows, folded)
