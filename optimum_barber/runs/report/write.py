"""From a finished run to files: one HTML page and, in a directory, one picture for each chart."""

from pathlib import Path
from typing import Any

from ...base.errors import BarberError
from ...base.files import read_json, write_file
from ...base.output import check_file, check_output, staged
from ...checkpoints.names import SPARSITY_NAME, STRUCTURE_NAME
from ..recipe.directory import RUN_NAME
from .charts import check_drawing, write_pictures
from .checkpoint_page import Rows, cell_page, checkpoint_page, shrunk_page
from .comparison import COMPARE_NAME, comparison_page
from .html import html
from .page import Page
from .recipe_page import run_page

INDEX_NAME = "index.html"
REPORT_PAGE = "report.html"
KINDS = (COMPARE_NAME, RUN_NAME, SPARSITY_NAME, STRUCTURE_NAME)  # the file that tells what a run is


def page_of(run: str | Path, evaluation: Rows = ()) -> Page:
    """The page of any finished run: a checkpoint, a recipe's run, a comparison, or one cell of it.

    Args:
        run: its directory; of a cell its JSON file.
        evaluation: for a checkpoint, what `eval --json` wrote.

    Raises:
        BarberError: it is none of these, or its files are broken.
    """
    path = Path(run)
    if path.is_file() and path.suffix == ".json":
        return cell_page(path)
    kinds = [kind for kind in KINDS if (path / kind).is_file()]
    if not kinds:
        raise BarberError(f"{run} is no finished run: it holds none of {', '.join(KINDS)}")
    try:
        return _page_of_kind(kinds[0], path, evaluation)
    except (KeyError, TypeError, AttributeError) as error:
        raise BarberError(f"{path} holds a record that is not whole: {type(error).__name__} {error}") from None


def _page_of_kind(kind: str, path: Path, evaluation: Rows) -> Page:
    if kind == COMPARE_NAME:
        return comparison_page(path)
    if kind == RUN_NAME:
        return run_page(path)
    if kind == SPARSITY_NAME:
        return checkpoint_page(path, evaluation)
    return shrunk_page(path, evaluation)


def write_report(
    run: str | Path, output: str | Path | None = None, evaluation: str | Path | None = None, overwrite: bool = False
) -> list[Path]:
    """Write the report of a finished run.

    Args:
        run: see `page_of`.
        output: a file ending in .html for the page alone; a directory for the page as `index.html` with one PNG for
            each chart, which needs the extra `report`; None for `report.html` in the run, which is replaced.
        evaluation: a file that `eval --json` wrote.
        overwrite: whether `output` may be there already.

    Returns:
        The files, the page first.

    Raises:
        BarberError: no finished run, the output may not be written, or pictures cannot be drawn; nothing was written.
    """
    rows: Any = []
    if evaluation is not None:
        rows = read_json(Path(evaluation))
    if not isinstance(rows, list):
        raise BarberError(f"eval {evaluation} is no list of results, as eval --json writes it")
    if output is None:
        output, overwrite = _default_output(Path(run)), True
    target = Path(output)
    if target.suffix.lower() in (".html", ".htm"):
        page = page_of(run, rows)
        write_file(check_file(target, overwrite), html(page))
        return [target]
    check_drawing(f"pictures in {target} (the page alone: -o FILE.html)")
    target = check_output(target, overwrite, [Path(run)])
    page = page_of(run, rows)
    with staged(target) as partial:
        (partial / INDEX_NAME).write_text(html(page), encoding="utf-8")
        pictures = write_pictures(partial, page.charts())
    return [target / INDEX_NAME, *(target / picture.name for picture in pictures)]


def _default_output(run: Path) -> Path:
    """The place of a report that was given none: in the run, or beside a cell's file."""
    if run.is_file():
        return run.with_suffix(".html")
    return run / REPORT_PAGE
