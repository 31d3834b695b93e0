"""A page as data: texts, tables and charts in sections, before anything is drawn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | None
MOST_SERIES = 8  # lines in one chart; more cannot be told apart


@dataclass
class Table:
    """Rows of plain values.

    Attributes:
        title: what it shows.
        columns: their heads.
        rows: a value for every column; None where there is none.
        folded: whether a page shows it only on request.
    """

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


@dataclass
class Chart:
    """What every chart has.

    Attributes:
        title: what it shows.
        note: how to read it.
    """

    title: str
    note: str

    def table(self) -> Table:
        """The chart's numbers."""
        raise NotImplementedError

    def in_words(self) -> str:
        """A description for readers who cannot see the chart."""
        raise NotImplementedError


@dataclass
class Lines(Chart):
    """Lines over a common axis.

    Attributes:
        x: name of the axis.
        y: name of the axis.
        series: at most `MOST_SERIES`.
        log_x: whether the axis is logarithmic.
        log_y: likewise.
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
        places = sorted({x for series in self.series for x in series.x})
        columns = [dict(zip(series.x, series.y, strict=False)) for series in self.series]
        rows: list[list[Value]] = []
        for x in places:
            rows.append([x, *(column.get(x) for column in columns)])
        return Table(self.title, [self.x, *(series.name for series in self.series)], rows, folded=True)

    def in_words(self) -> str:
        """The axes, the range of each series and the marks."""
        parts = [f"{series.name}: {_range(series.y)}" for series in self.series]
        parts += [name for _, name in self.marks]
        if self.reference:
            parts.append(_reference(self.reference))
        return f"{self.y} over {self.x}. {'; '.join(parts)}"


@dataclass
class Bars(Chart):
    """One bar for each name.

    Attributes:
        unit: of the values.
        values: by name; None where it failed.
        reference: name and value of a line to compare with.
        log: whether the axis is logarithmic.
    """

    unit: str
    values: Mapping[str, float | None]
    reference: tuple[str, float] | None = None
    log: bool = False

    def table(self) -> Table:
        """One row for each bar, the reference first."""
        rows: list[list[Value]] = [list(self.reference)] if self.reference else []
        rows += map(list, self.values.items())
        return Table(self.title, ["", self.unit], rows, folded=True)

    def in_words(self) -> str:
        """The reference and every value."""
        parts = [_reference(self.reference)] if self.reference else []
        parts += map(_reference, self.values.items())
        return "; ".join(parts)


@dataclass
class Heat(Chart):
    """A matrix of shares in [0, 1], each written into its cell in per cent.

    Attributes:
        rows: their names.
        columns: their names.
        values: one sequence for each row; None where there is nothing.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]

    def table(self) -> Table:
        """The matrix."""
        rows = [[name, *values] for name, values in zip(self.rows, self.values, strict=True)]
        return Table(self.title, ["", *self.columns], rows, folded=True)

    def in_words(self) -> str:
        """The size and the range of the matrix."""
        values = [value for row in self.values for value in row]
        return f"{len(self.rows)} rows and {len(self.columns)} columns: {_range(values)}"


@dataclass
class Section:
    """A heading and what stands under it: texts, tables, charts, and sections one level deeper."""

    title: str
    items: list[Any] = field(default_factory=list)


@dataclass
class Page:
    """A whole report.

    Attributes:
        title: of the page.
        summary: one sentence or two.
        sections: in order.
    """

    title: str
    summary: str
    sections: list[Section] = field(default_factory=list)

    def charts(self) -> list[Chart]:
        """All charts in order."""
        return _charts_in(self.sections)


def _charts_in(items: Iterable[Any]) -> list[Chart]:
    charts: list[Chart] = []
    for item in items:
        if isinstance(item, Section):
            charts += _charts_in(item.items)
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


def _reference(entry: tuple[str, float | None]) -> str:
    name, value = entry
    return f"{name} {as_text(value)}"


def _range(values: Iterable[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "nothing"
    return f"from {as_text(min(numbers))} to {as_text(max(numbers))}"
