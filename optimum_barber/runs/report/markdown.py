"""A page as Markdown: its texts and tables, without the charts and their numbers."""

from collections.abc import Iterable, Sequence

from .page import Page, Section, Table, Value, as_text


def markdown(page: Page) -> str:
    """The whole document."""
    return "\n".join([f"# {page.title}", "", page.summary, "", *_sections(page.sections, 2)]).rstrip() + "\n"


def _sections(sections: Sequence[Section], level: int) -> list[str]:
    lines: list[str] = []
    for section in sections:
        content: list[str] = []
        for item in section.items:
            if isinstance(item, Section):
                content += _sections([item], level + 1)
            elif isinstance(item, Table) and not item.folded:
                content += [rows(item), ""]
            elif isinstance(item, str):
                content += [item, ""]
        if content:
            lines += ["#" * level + " " + section.title, "", *content]
    return lines


def rows(table: Table) -> str:
    """A Markdown table."""
    return "\n".join(map(_line, [table.columns, ["---"] * len(table.columns), *table.rows]))


def _line(values: Iterable[Value]) -> str:
    cells = [as_text(value).replace("|", "\\|").replace("\n", " ") for value in values]
    return f"| {' | '.join(cells)} |"
