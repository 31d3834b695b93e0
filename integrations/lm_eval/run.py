"""The command line of lm-eval, with model `barber` registered and tasks out of local files."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from optimum_barber.base.errors import BarberError
from optimum_barber.base.ranks import several_ranks
from optimum_barber.runs.tasks.evaluate import check_installed
from optimum_barber.runs.tasks.offline import offline_tasks


def run_harness(arguments: Sequence[str]) -> None:
    """Hand a command line to lm-eval, with model `barber` registered and local task files put in its terms.

    Raises:
        MissingExtraError: lm-eval is not installed.
        BarberError: bad model arguments or task files.
        SystemExit: lm-eval's parser ended the run, as for --help.
    """
    check_installed()
    from lm_eval.__main__ import cli_evaluate

    from optimum_barber.integrations.lm_eval import model as lm_eval_model  # noqa: F401 - registers `barber`

    before = sys.argv
    with TemporaryDirectory() as folder:
        sys.argv = ["lm-eval", *_with_local_tasks(arguments, Path(folder))]
        try:
            cli_evaluate()
        except BarberError:
            raise
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            raise BarberError(f"lm-eval: {refusal}") from None
        finally:
            sys.argv = before


def _with_local_tasks(arguments: Sequence[str], folder: Path) -> list[str]:
    """Return the command line with YAML files in the place of local task files, where it is one of `run`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", "-t", nargs="+", action="extend", default=[])
    known, rest = parser.parse_known_args(arguments)
    names = [name for name in ",".join(known.tasks).split(",") if name]
    if arguments[0] != "run" or not names:
        return list(arguments)
    tasks = []
    for number, task in enumerate(offline_tasks(names, folder)):
        if isinstance(task, str):
            tasks.append(task)
            continue
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(task, allow_unicode=True), encoding="utf-8")
        tasks.append(str(path))
    return [*rest, "--tasks", *tasks]


def _refusal(error: Exception) -> str | None:
    """Why lm-eval refuses what it was told, unknown tasks among it; None if the error is no refusal."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    if Path(place.filename).stem == "evaluate_config":
        return str(error)
    if place.name == "build_all_requests" and several_ranks():
        return "a task has fewer rows than there are processes: give fewer devices"
    return None
