"""What a page holds, before anybody draws it: texts, tables and charts in sections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | None


@dataclass
class Table:
    """Rows of plain values.

    Attributes:
        title: what it shows.
        columns: their heads.
        rows: a value for every column; None where there is none.
        folded: whether a page shows it only when asked.
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


@dataclass
class Lines(Chart):
    """Lines over a common axis.

    Attributes:
        x: name of the axis.
        y: name of the axis.
        series: at most eight; more could not be told apart.
        log_x: whether the axis is logarithmic.
        log_y: likewise.
        marks: places on the x axis that are marked, with a label each.
        stepped: a histogram: each value holds up to the next x, and there is one x more than values.
    """

    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[tuple[float, str]] = ()
    stepped: bool = False

    def table(self) -> Table:
        """One row an x; a column a series."""
        places = sorted({x for series in self.series for x in series.x})
        found = [dict(zip(series.x, series.y, strict=False)) for series in self.series]
        rows = [[x, *(values.get(x) for values in found)] for x in places]
        return Table(self.title, [self.x, *(series.name for series in self.series)], rows, folded=True)


@dataclass
class Bars(Chart):
    """One bar a name.

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
        """One row a bar, the reference first."""
        rows: list[list[Value]] = [list(self.reference)] if self.reference else []
        rows += [[name, value] for name, value in self.values.items()]
        return Table(self.title, ["", self.unit], rows, folded=True)


@dataclass
class Heat(Chart):
    """A matrix of shares in [0, 1], each written into its cell in per cent.

    Attributes:
        rows: their names.
        columns: their names.
        values: a row each; None where there is nothing.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]

    def table(self) -> Table:
        """The matrix."""
        rows = [[name, *values] for name, values in zip(self.rows, self.values, strict=True)]
        return Table(self.title, ["", *self.columns], rows, folded=True)


@dataclass
class Section:
    """A heading with what stands under it: texts, tables, charts and sections one level deeper."""

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

        def within(items: Sequence[Any]) -> list[Chart]:
            found: list[Chart] = []
            for item in items:
                found += within(item.items) if isinstance(item, Section) else [item] if isinstance(item, Chart) else []
            return found

        return within(self.sections)


def plainly(value: Value) -> str:
    """A count in full, anything else that is a number to six digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else value
