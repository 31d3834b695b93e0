"""`optimum-barber run`: a chain of stages out of one YAML file."""

import argparse
import json
import sys
from typing import Any

from .terminal import hush_loading_bars, write_done

HELP = "Run a recipe: prune, rebuild, tune, merge, quantize, evaluate, report, from one YAML file."
EPILOG = """\
A stage whose settings and inputs have not changed since the last run is not done again; a run that was stopped
goes on with the stage it was stopped in.

examples:
  optimum-barber run --list
  optimum-barber run demo --dry-run
  optimum-barber run recipe.yaml --set prune.sparsity=0.6 --set 'calibration.texts=[mine.txt]' --track tensorboard
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `run`."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="lay a value over the recipe's; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the plan, do nothing")
    parser.add_argument(
        "--track", action="append", default=[], choices=("mlflow", "tensorboard", "wandb"), help="follow the run there"
    )
    parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no warnings")


def run(args: argparse.Namespace) -> int:
    """Run; a line a stage says what it did, the last where the model is."""
    from ..base.errors import BarberError

    hush_loading_bars(args.quiet)
    if args.list:
        sys.stdout.write(listing())
    elif args.schema:
        from ..runs.recipe.schema import json_schema

        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    elif args.recipe is None:
        raise BarberError("recipe is missing: a YAML file, or a shipped one of run --list")
    elif args.dry_run:
        sys.stdout.write(dry_run(args.recipe, args.set))
    else:
        from ..runs.recipe import run_recipe

        result = run_recipe(args.recipe, args.set, track=args.track, quiet=args.quiet, tell=tell)
        sys.stdout.write(f"model: {result.model}\n")
    return 0


def listing() -> str:
    """Name and first comment of every shipped recipe."""
    from ..runs.recipe.shipped import shipped_recipes

    lines = []
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"{name:<28} {first}")
    return "\n".join(lines) + "\n"


def dry_run(name: str, settings: list[str]) -> str:
    """The plan: every stage, whether its result is there, and what the model takes."""
    from ..models.loading import resolve_model
    from ..prune.inspection import inspect_model
    from ..runs.recipe.runner import steps_of
    from ..runs.recipe.shipped import find_recipe
    from ..runs.recipe.validation import read_recipe

    recipe = read_recipe(find_recipe(name), settings)
    lines = [f"recipe        {recipe.name} -> {recipe.output}"]
    for step in steps_of(recipe):
        changed = step.stage.model_dump(exclude_defaults=True)
        text = ", ".join(f"{key} {_plain(value)}" for key, value in changed.items())
        state = "done already" if step.done else "to do"
        lines.append(f"{step.directory:<14}{state:<14}{text}".rstrip())
    calibration = recipe.calibration
    page = inspect_model(resolve_model(recipe.model), calibration.samples, calibration.sequence_length)
    return "\n".join(lines) + "\n" + page


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def tell(directory: str, figures: dict[str, Any], reused: bool) -> None:
    """One line a stage, as soon as it is done."""
    from ..runs.figures import flat
    from ..runs.report.page import as_text

    parts = []
    for key, value in flat(figures).items():
        if key != "seconds" and "loss/" not in key:
            parts.append(f"{key} {as_text(value)}")
    write_done(directory, ", ".join([*parts, f"{figures.get('seconds', 0):.1f} s"]), reused)
