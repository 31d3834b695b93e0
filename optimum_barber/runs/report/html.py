"""A page as one HTML file: no script, no request; style, charts and numbers are all inside."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from ...base.version import __version__
from .charts import can_draw, svg
from .page import Chart, Page, Section, Table, Value, as_text

WIDE = 40  # letters from which a cell may break its line anywhere
NO_CHARTS = "Not drawn: charts need pip install 'optimum-barber[report]'; their numbers are here as tables."


def html(page: Page) -> str:
    """The whole document; without matplotlib its charts are tables only."""
    links = []
    sections = []
    for number, section in enumerate(page.sections, 1):
        links.append(f'<li><a href="#s{number}">{escape(section.title)}</a></li>')
        sections.append(_section(section, 2, f"s{number}"))
    remark = ""
    if page.charts() and not can_draw():
        remark = _paragraph(NO_CHARTS) + "\n"
    return Template(_resource("page.html")).substitute(
        version=__version__,
        title=escape(page.title),
        style=_resource("style.css"),
        summary=escape(page.summary),
        remark=remark,
        links="".join(links),
        sections="\n".join(sections),
    )


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _section(section: Section, level: int, name: str) -> str:
    """A section and those inside it; charts that follow one another share a grid."""
    parts = [f'<section id="{name}">', f"<h{level}>{escape(section.title)}</h{level}>"]
    figures: list[str] = []
    for number, item in enumerate(section.items, 1):
        place = f"{name}-{number}"
        if isinstance(item, Chart):
            figures.append(_figure(item, place))
            continue
        parts += _grid(figures)
        figures = []
        if isinstance(item, Section):
            parts.append(_section(item, level + 1, place))
        elif isinstance(item, Table):
            parts.append(_table(item))
        else:
            parts.append(_paragraph(item))
    return "\n".join([*parts, *_grid(figures), "</section>"])


def _grid(figures: Sequence[str]) -> list[str]:
    return [f'<div class="charts">{"".join(figures)}</div>'] if figures else []


def _paragraph(text: str) -> str:
    """A paragraph; one that begins with "Not" says what a run lacks."""
    kind = ' class="absent"' if text.startswith("Not ") else ""
    return f"<p{kind}>{escape(text)}</p>"


def _figure(chart: Chart, name: str) -> str:
    """A chart with its caption and its numbers."""
    note = f"<span>{escape(chart.note)}</span>" if chart.note else ""
    drawing = svg(chart, name) if can_draw() else ""
    caption = f"<figcaption>{escape(chart.title)}{note}</figcaption>"
    return f"<figure>{caption}{drawing}{_table(chart.table())}</figure>"


def _table(content: Table) -> str:
    """A table that scrolls in its own box; a folded one opens on request."""
    title = escape(content.title)
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in content.columns)
    body = "\n".join(map(_row, content.rows))
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )
    if content.folded:
        return f"<details><summary>Numbers: {title}</summary>{table}</details>"
    return table


def _row(row: Sequence[Value]) -> str:
    cells = []
    for column, value in enumerate(row):
        text, kind = _cell(value)
        cells.append(f"<td{kind}>{text}</td>" if column else f'<th scope="row">{text}</th>')
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: Value) -> tuple[str, str]:
    """The content of a cell, a number with its exact value beside it, and the class of the cell."""
    text = escape(as_text(value))
    if isinstance(value, int | float):
        return f'<data value="{value!r}">{text}</data>', ' class="number"'
    if len(text) > WIDE:
        return text, ' class="wide"'
    return text, ""
