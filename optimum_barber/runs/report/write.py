"""From a finished run to files: one HTML page, and one picture a chart."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from ...base.errors import BarberError
from ...base.files import read_json, write_file
from ...base.output import check_file, check_output, staged
from ...checkpoints.names import SPARSITY_NAME, STRUCTURE_NAME
from ..recipe.directory import RUN_NAME
from .checkpoint_page import Rows, cell_page, checkpoint_page, shrunk_page
from .comparison import COMPARE_NAME, comparison_page
from .html import html
from .page import Page
from .pictures import write_pictures
from .recipe_page import run_page

INDEX_NAME = "index.html"
REPORT_PAGE = "report.html"


def page_of(run: str | Path, evaluation: Rows = ()) -> Page:
    """The page of any finished run: a checkpoint, a recipe's run, a comparison, or one cell of it.

    Args:
        run: its directory; of a cell its JSON file.
        evaluation: for a checkpoint, what `eval --json` wrote.

    Raises:
        BarberError: it is none of these, or its files are broken.
    """
    path = Path(run)
    kinds: dict[str, Callable[[], Page]] = {
        COMPARE_NAME: lambda: comparison_page(path),
        RUN_NAME: lambda: run_page(path),
        SPARSITY_NAME: lambda: checkpoint_page(path, evaluation),
        STRUCTURE_NAME: lambda: shrunk_page(path, evaluation),
    }
    if path.is_file() and path.suffix == ".json":
        return cell_page(path)
    for name, make in kinds.items():
        if (path / name).is_file():
            return _whole(path, make)
    raise BarberError(f"{run} is no finished run: it holds none of {', '.join(kinds)}")


def _whole(path: Path, make: Callable[[], Page]) -> Page:
    try:
        return make()
    except (KeyError, TypeError, AttributeError) as error:
        raise BarberError(f"{path} holds a record that is not whole: {type(error).__name__} {error}") from None


def write_report(
    run: str | Path, output: str | Path | None = None, evaluation: str | Path | None = None, overwrite: bool = False
) -> list[Path]:
    """Write the report of a finished run.

    Args:
        run: see `page_of`.
        output: a file ending in .html for the page alone; a directory for the page as `index.html` with one PNG a
            chart; None for `report.html` within the run, which is replaced.
        evaluation: a file that `eval --json` wrote.
        overwrite: whether `output` may be there already.

    Returns:
        The files, the page first.

    Raises:
        BarberError: no finished run, or the output may not be written; nothing was.
    """
    measured = read_json(Path(evaluation)) if evaluation is not None else []
    if not isinstance(measured, list):
        raise BarberError(f"eval {evaluation} is no list of results, as eval --json writes it")
    target = Path(output) if output is not None else _beside(Path(run))
    if target.suffix.lower() in (".html", ".htm"):
        page = page_of(run, measured)
        write_file(check_file(target, overwrite or output is None), html(page))
        return [target]
    target = check_output(target, overwrite, [Path(run)] if Path(run).exists() else [])
    page = page_of(run, measured)
    with staged(target) as partial:
        (partial / INDEX_NAME).write_text(html(page), encoding="utf-8")
        pictures = write_pictures(partial, page.charts()) if has_pictures() else []
    return [target / INDEX_NAME, *(target / picture.name for picture in pictures)]


def has_pictures() -> bool:
    """Whether matplotlib is installed; the page does not need it."""
    return importlib.util.find_spec("matplotlib") is not None


def _beside(run: Path) -> Path:
    """Where a report goes that was given no place: into the run, or beside a cell's file."""
    return run.with_suffix(".html") if run.is_file() else run / REPORT_PAGE
