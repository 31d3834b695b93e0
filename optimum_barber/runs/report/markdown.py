"""A page as Markdown: its texts and tables, without the charts and their numbers."""

from collections.abc import Sequence

from .page import Page, Section, Table, plainly


def markdown(page: Page) -> str:
    """The whole document."""
    return "\n".join([f"# {page.title}", "", page.summary, "", *_sections(page.sections, 2)]).rstrip() + "\n"


def _sections(sections: Sequence[Section], level: int) -> list[str]:
    found: list[str] = []
    for section in sections:
        inner: list[str] = []
        for item in section.items:
            if isinstance(item, Section):
                inner += _sections([item], level + 1)
            elif isinstance(item, Table) and not item.folded:
                inner += [rows(item), ""]
            elif isinstance(item, str):
                inner += [item, ""]
        found += ["#" * level + " " + section.title, "", *inner] if inner else []
    return found


def rows(table: Table) -> str:
    """A Markdown table."""
    head = [" | ".join(map(str, table.columns)), " | ".join("---" for _ in table.columns)]
    body = [" | ".join(plainly(value).replace("|", "\\|").replace("\n", " ") for value in row) for row in table.rows]
    return "\n".join(f"| {line} |" for line in [*head, *body])
