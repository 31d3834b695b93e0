"""Results as a notebook shows them: a line, and a table."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def notebook_table(title: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return HTML with a title above a table; numbers are short, and a value that a row lacks is empty.

    Args:
        title: plain text, such as "50.00% sparse, unstructured".
        rows: of plain values by column.
        columns: the names of those to show, in order.
    """
    head = "".join(f"<th>{escape(column.replace('_', ' '))}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(_shown(row.get(column)))}</td>" for column in columns)
        lines.append(f"<tr>{cells}</tr>")
    return f"<p>{escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
