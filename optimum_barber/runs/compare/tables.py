"""What a comparison writes beside its cells: `compare.json`, `compare.csv`, `compare.md` and the page."""

from typing import TYPE_CHECKING

from ...base.files import csv_table, write_file, write_json
from ...checkpoints.write import software
from ..report.comparison import COMPARE_NAME, flat_rows, page_of_cells
from ..report.html import html
from ..report.markdown import markdown

if TYPE_CHECKING:
    from .runner import ComparePlan, Comparison


def write_tables(plan: "ComparePlan", result: "Comparison") -> None:
    """Bring all of them up to date; each is written beside and put in place."""
    output = result.output
    done = len(result.cells) == len(plan.cells)
    content = {
        "format_version": 1,
        "status": "finished" if done else "unfinished",
        "model": plan.reference.full_name,
        "settings": plan.settings.model_dump(mode="json"),
        "base": plan.base.model_dump(
            mode="json", exclude={"producer", "producer_args", "rebuild", "pattern", "sparsity"}
        ),
        "cells": [cell.name for cell in plan.cells],
        "fingerprints": plan.fingerprints,
        "software": software(),
    }
    write_json(output / COMPARE_NAME, content)
    if result.cells:
        page = page_of_cells(content, [*result.cells.values()], result.dense)
        write_file(output / "compare.csv", csv_of(flat_rows([*result.cells.values()], result.dense)))
        write_file(output / "compare.md", markdown(page))
        write_file(output / "report.html", html(page))


def csv_of(rows: list[dict[str, object]]) -> str:
    """Rows as CSV; the columns are those of all rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return csv_table(rows, columns)
