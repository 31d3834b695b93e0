"""From a finished run to files: one HTML page and, in a directory, one picture for each chart."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...base.errors import BarberError
from ...base.files import read_json, write_file
from ...base.output import check_file, check_output, staged
from ...checkpoints.card.evaluation import read_evaluation
from ...checkpoints.names import EXPERTS_NAME, PAGE_NAME, SPARSITY_NAME, STRUCTURE_NAME
from ...models.loading import brief
from ..recipe.stage import RUN_NAME
from .charts import check_drawing, save
from .checkpoint_page import Evaluation, cell_page, checkpoint_page, experts_page, shrunk_page
from .comparison import COMPARE_NAME, comparison_page
from .html import html
from .page import Page, charts_in
from .recipe_page import run_page

INDEX_NAME = "index.html"
PAGES: dict[str, Callable[[Path, Evaluation], Page]] = {  # by the file that tells what a run is
    COMPARE_NAME: lambda path, _: comparison_page(path),
    RUN_NAME: lambda path, _: run_page(path),
    SPARSITY_NAME: checkpoint_page,
    STRUCTURE_NAME: shrunk_page,
    EXPERTS_NAME: experts_page,
}


def page_of(run: str | Path, evaluation: Evaluation = ()) -> Page:
    """The page of any finished run: a checkpoint, a recipe's run, a comparison, or one cell of it.

    Args:
        run: its directory; of a cell its JSON file.
        evaluation: for a checkpoint, what `eval --json` wrote.

    Raises:
        BarberError: it is none of these, or its files are broken.
    """
    path = Path(run)
    a_cell = path.is_file() and path.suffix == ".json"
    kinds = [kind for kind in PAGES if (path / kind).is_file()]
    if not kinds and not a_cell:
        raise BarberError(f"{run} is no finished run: it holds none of {', '.join(PAGES)}")
    try:
        return cell_page(path) if a_cell else PAGES[kinds[0]](path, evaluation)
    except BarberError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BarberError(f"{path} holds a record that is not whole: {brief(error)}") from None


def write_report(
    run: str | Path, output: str | Path | None = None, evaluation: str | Path | None = None, overwrite: bool = False
) -> list[Path]:
    """Write the report of a finished run.

    Args:
        run: see `page_of`.
        output: a file ending in .html for the page alone; a directory for the page as `index.html` with one PNG for
            each chart, which needs the extra `report`; None for `report.html` in the run, which is replaced.
        evaluation: a file that `eval --json` wrote; None for what `eval` kept beside a checkpoint, if anything.
        overwrite: whether `output` may be there already.

    Returns:
        The files, the page first.

    Raises:
        BarberError: no finished run, the output may not be written, or pictures cannot be drawn; nothing was written.
    """
    rows: Any = read_evaluation(Path(run)) if evaluation is None else read_json(Path(evaluation))
    if not isinstance(rows, list):
        raise BarberError(f"eval {evaluation} is no list of results, as eval --json writes it")
    if output is None:
        place = Path(run)
        output = place.with_suffix(".html") if place.is_file() else place / PAGE_NAME
        overwrite = True
    target = Path(output)
    if target.suffix.lower() in (".html", ".htm"):
        page = page_of(run, rows)
        write_file(check_file(target, overwrite), html(page))
        return [target]
    check_drawing(f"pictures in {target} (the page alone: -o FILE.html)")
    target = check_output(target, overwrite, [Path(run)])
    page = page_of(run, rows)
    names = [INDEX_NAME]
    with staged(target) as partial:
        (partial / INDEX_NAME).write_text(html(page), encoding="utf-8")
        for number, chart in enumerate(charts_in(page.sections), 1):
            name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
            names.append(f"{number:02d}-{name}.png")
            save(partial / names[-1], [chart])
    return [target / name for name in names]
