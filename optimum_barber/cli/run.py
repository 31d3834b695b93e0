"""`optimum-barber run`: a chain of stages out of one YAML file."""

import argparse
import json
import sys
from typing import Any

from ..base.errors import BarberError
from .terminal import write_done

HELP = "Run a recipe, one YAML file of stages: prune, rebuild, tune, merge, quantize, evaluate, report."
EPILOG = """\
Stages whose settings and inputs have not changed are not run again; a stopped run resumes with its unfinished stage.

examples:
  optimum-barber run demo --dry-run
  optimum-barber run recipe.yaml --set prune.sparsity=0.6 --set 'calibration.texts=[mine.txt]' --track tensorboard
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a value of the recipe; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and show the plan, without a run")
    parser.add_argument(
        "--track", action="append", default=[], choices=("mlflow", "tensorboard", "wandb"),
        help="log the run to a tracker; repeatable",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the shipped recipes and exit")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes and exit")
    parser.add_argument("--quiet", action="store_true", help="print no progress bars or warnings")


def run(args: argparse.Namespace) -> int:
    """Run; one line per stage, and at the end the directory of the model."""
    if args.list:
        _list_recipes()
    elif args.schema:
        from ..runs.recipe.schema import json_schema

        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    elif args.recipe is None:
        raise BarberError("recipe is missing: a YAML file, or a shipped one of run --list")
    elif args.dry_run:
        _write_plan(args.recipe, args.set)
    else:
        from ..runs.recipe import run_recipe

        result = run_recipe(args.recipe, args.set, track=args.track, quiet=args.quiet, tell=_tell)
        sys.stdout.write(f"model: {result.model}\n")
    return 0


def _list_recipes() -> None:
    from ..runs.recipe.document import shipped_recipes

    for name, path in shipped_recipes().items():
        comment = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        sys.stdout.write(f"{name:<28} {comment}\n")


def _write_plan(name: str, settings: list[str]) -> None:
    """Write every stage, whether its result is there, and the page of `inspect`."""
    from ..models.loading import resolve_model
    from ..prune.inspection import inspect_model
    from ..runs.recipe.document import find_recipe
    from ..runs.recipe.runner import check_stages, steps_of
    from ..runs.recipe.validation import read_recipe

    recipe = read_recipe(find_recipe(name), settings)
    lines = [f"recipe        {recipe.name} -> {recipe.output}"]
    steps = steps_of(recipe)
    check_stages(recipe, steps)
    for step in steps:
        texts = []
        for key, value in step.stage.model_dump(exclude_defaults=True).items():
            texts.append(f"{key} {json.dumps(value) if isinstance(value, dict | list) else value}")
        state = "done already" if step.done else "to do"
        lines.append(f"{step.directory:<14}{state:<14}{', '.join(texts)}".rstrip())
    calibration = recipe.calibration
    page = inspect_model(resolve_model(recipe.model), calibration.samples, calibration.sequence_length)
    sys.stdout.write("\n".join([*lines, page]))


def _tell(directory: str, figures: dict[str, Any], reused: bool) -> None:
    from ..runs.recipe.stage import flat
    from ..runs.report.page import as_text

    parts = []
    for key, value in flat(figures).items():
        if key != "seconds" and "loss/" not in key:
            parts.append(f"{key} {as_text(value)}")
    write_done(directory, ", ".join([*parts, f"{figures.get('seconds', 0):.1f} s"]), reused)
