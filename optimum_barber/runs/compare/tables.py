"""What a comparison writes beside its cells: `compare.json`, `compare.csv`, `compare.md` and the page."""

from collections.abc import Sequence

from ...base.files import csv_table, write_file, write_json
from ...checkpoints.write import software
from ..cells import Record
from ..report.comparison import COMPARE_NAME, flat_rows, page_of_cells
from ..report.html import html
from ..report.markdown import markdown
from .plan import ComparePlan
from .settings import OF_A_CELL


def write_tables(plan: ComparePlan, dense: Record, records: Sequence[Record]) -> None:
    """Bring all of them up to date with the record of the dense model and those of the cells that are done."""
    content = {
        "format_version": 1,
        "status": "finished" if len(records) == len(plan.cells) else "unfinished",
        "model": plan.reference.full_name,
        "settings": plan.settings.model_dump(mode="json"),
        "base": plan.base.model_dump(mode="json", exclude=OF_A_CELL),
        "cells": [cell.name for cell in plan.cells],
        "fingerprints": plan.fingerprints,
        "software": software(),
    }
    write_json(plan.output / COMPARE_NAME, content)
    if not records:
        return
    rows = flat_rows(records, dense)
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    page = page_of_cells(content, records, dense)
    write_file(plan.output / "compare.csv", csv_table(rows, list(columns)))
    write_file(plan.output / "compare.md", markdown(page))
    write_file(plan.output / "report.html", html(page))
