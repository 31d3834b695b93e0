"""A page as one HTML file: no script, no request; style, charts and numbers are all within."""

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any

from ...base.version import __version__
from .page import Chart, Page, Section, Table, Value, plainly
from .style import DARK, LIGHT
from .svg import svg

WIDE = 40  # letters, from which a cell may break its line anywhere


def html(page: Page) -> str:
    """The whole document."""
    sections = "\n".join(_section(section, 2, f"s{number}") for number, section in enumerate(page.sections, 1))
    links = "".join(f'<li><a href="#s{n}">{escape(s.title)}</a></li>' for n, s in enumerate(page.sections, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="optimum-barber {__version__}">
<title>{escape(page.title)}</title>
<link rel="icon" href="data:,">
<style>
{stylesheet()}</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
<p>{escape(page.summary)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
<footer><p>optimum-barber {__version__}</p></footer>
</body>
</html>
"""


def stylesheet() -> str:
    """The style with the colours of the series filled in."""
    style = files(__package__).joinpath("style.css").read_text("utf-8")
    series = [f".s{i} {{ stroke: var(--s{i}); }} .f{i} {{ fill: var(--s{i}); }}" for i in range(len(LIGHT))]
    for word, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        style = style.replace(word, " ".join(f"--s{index}: {colour};" for index, colour in enumerate(colours)))
    return style.replace("SERIES", "\n".join(series))


def _section(section: Section, level: int, name: str) -> str:
    parts = [f'<section id="{name}">', f"<h{level}>{escape(section.title)}</h{level}>"]
    number = 0
    for kind, items in groupby(section.items, key=_kind):
        if kind is Chart:
            parts.append('<div class="charts">' + "".join(map(figure, items)) + "</div>")
        elif kind is Section:
            for inner in items:
                number += 1
                parts.append(_section(inner, level + 1, f"{name}-{number}"))
        else:
            parts += [table(item) if isinstance(item, Table) else paragraph(item) for item in items]
    return "\n".join([*parts, "</section>"])


def _kind(item: Any) -> type:
    return Chart if isinstance(item, Chart) else Section if isinstance(item, Section) else str


def paragraph(text: str) -> str:
    """A paragraph; one that begins with "Not" says what a run lacks."""
    return f'<p class="absent">{escape(text)}</p>' if text.startswith("Not ") else f"<p>{escape(text)}</p>"


def figure(chart: Chart) -> str:
    """A chart with its caption and its numbers."""
    note = f"<span>{escape(chart.note)}</span>" if chart.note else ""
    caption = f"<figcaption>{escape(chart.title)}{note}</figcaption>"
    return f"<figure>{caption}{svg(chart)}{table(chart.table())}</figure>"


def table(content: Table) -> str:
    """A table that scrolls in its own box; a folded one opens on request."""
    title = escape(content.title)
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in content.columns)
    body = "\n".join(f"<tr>{''.join(_cells(row))}</tr>" for row in content.rows)
    drawn = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(content.title, quote=True)}">'
        f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )
    return f"<details><summary>Numbers: {title}</summary>{drawn}</details>" if content.folded else drawn


def _cells(row: Iterable[Value]) -> Iterable[str]:
    """The cells of a row, numbers with their exact value beside what is shown."""
    for index, value in enumerate(row):
        said = escape(plainly(value))
        held = f'<data value="{value!r}">{said}</data>' if isinstance(value, int | float) else said
        if index == 0:
            yield f'<th scope="row">{held}</th>'
        else:
            kind = ' class="number"' if held != said else ' class="wide"' if len(said) > WIDE else ""
            yield f"<td{kind}>{held}</td>"
