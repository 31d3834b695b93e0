"""A page as one HTML file: no script, no request; style, charts and numbers are all inside."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from ...base.version import __version__
from .charts import can_draw, svg
from .page import Chart, Page, Section, Table, Value, as_text, charts_in

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
    if charts_in(page.sections) and not can_draw():
        remark = _paragraph(NO_CHARTS) + "\n"
    folder = files(__package__)
    return Template(folder.joinpath("page.html").read_text("utf-8")).substitute(
        version=__version__,
        title=escape(page.title),
        style=folder.joinpath("style.css").read_text("utf-8"),
        summary=escape(page.summary),
        remark=remark,
        links="".join(links),
        sections="\n".join(sections),
    )


def _section(section: Section, level: int, name: str) -> str:
    """A section and those inside it; charts that follow one another share a grid."""
    parts = [f'<section id="{name}">', f"<h{level}>{escape(section.title)}</h{level}>"]
    figures: list[str] = []
    for number, item in enumerate([*section.items, None], 1):
        place = f"{name}-{number}"
        if isinstance(item, Chart):
            figures.append(_figure(item, place))
            continue
        if figures:
            parts.append(f'<div class="charts">{"".join(figures)}</div>')
            figures = []
        if isinstance(item, Section):
            parts.append(_section(item, level + 1, place))
        elif isinstance(item, Table):
            parts.append(_table(item))
        elif item is not None:  # None ends the last grid
            parts.append(_paragraph(item))
    return "\n".join([*parts, "</section>"])


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
    """One row; a number has its exact value beside it."""
    cells = []
    for column, value in enumerate(row):
        text, kind = escape(as_text(value)), ""
        if isinstance(value, int | float):
            text, kind = f'<data value="{value!r}">{text}</data>', ' class="number"'
        elif len(text) > WIDE:
            kind = ' class="wide"'
        cells.append(f"<td{kind}>{text}</td>" if column else f'<th scope="row">{text}</th>')
    return f"<tr>{''.join(cells)}</tr>"
