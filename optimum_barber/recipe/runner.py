"""Running a recipe: every stage is kept with its fingerprint, so that a second run redoes only what changed."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..artifacts import SPARSITY_NAME, write_json
from ..checkpoint import software
from ..errors import BarberError, FailedCheckError, unknown_name
from ..output import staged
from ..verify import verify_product
from . import fingerprint
from .schema import Recipe
from .stage import MODEL, Stage, Work
from .stages.evaluate import flat
from .tracking import Trackers
from .validation import read_recipe

RUN_NAME = "run.json"
STAGE_NAME = "stage.json"
SCRATCH = ".unfinished"
ADAPTER_NAME = "sparsity_adapter.json"


@dataclass
class Step:
    """One stage in its place.

    Attributes:
        directory: name of its directory in the output.
        stage: its settings.
        fingerprint: of everything that it works from.
        done: whether the directory holds its result already.
    """

    directory: str
    stage: Stage
    fingerprint: str
    done: bool = False


@dataclass
class RunResult:
    """What a run left.

    Attributes:
        model: the last model or adapter that a stage made; the recipe's own where none did.
        output: the directory of all stages.
        stages: figures of every stage by directory.
        reused: directories of the stages that were not done again.
        base: the dense model behind `model`: the recipe's own, or what a stage cut out of it.
    """

    model: str
    output: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    base: str = ""


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships with the package.

    Raises:
        BarberError: neither; names the nearest shipped ones.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise BarberError(f"{unknown_name('recipe', name, shipped)}, or a YAML file")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(files("optimum_barber.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def steps_of(recipe: Recipe) -> list[Step]:
    """All stages with their fingerprints, which follow from the settings alone."""
    steps: list[Step] = []
    model = fingerprint.of_model(recipe.model)
    for number, stage in enumerate(recipe.stages, 1):
        before = model if stage.gives else fingerprint.digest([model, *(step.fingerprint for step in steps)])
        found = fingerprint.of_stage(recipe, stage, before)
        model = found if stage.gives else model
        directory = f"{number:02d}-{stage.kind}"
        done = _record(Path(recipe.output) / directory).get("fingerprint") == found
        steps.append(Step(directory, stage, found, done))
    return steps


def run_recipe(
    name: str | Path, settings: Sequence[str] = (), *, track: Sequence[str] = (), quiet: bool = False
) -> RunResult:
    """Run a recipe; stages whose result is there already are not done again.

    Args:
        name: a YAML file, or the name of a shipped recipe.
        settings: `path=value` over what the file says.
        track: trackers beside those of the recipe.
        quiet: no progress bars.

    Raises:
        RecipeError: every fault of the recipe, before any work.
        FailedCheckError: a stage lost a zero.
    """
    recipe = read_recipe(find_recipe(str(name)), settings)
    output = _output(recipe)
    steps = steps_of(recipe)
    trackers = Trackers([*recipe.track, *track], recipe.name, output / "tracking", flat_settings(recipe))
    result = RunResult(recipe.model, output, base=recipe.model)
    record = {"name": recipe.name, "recipe": str(name), "started": _now(), "software": software()}
    try:
        for step in steps:
            _note(result, record, "running", step.directory)
            _do(recipe, step, result, trackers, quiet)
        _note(result, record, "finished")
    except BaseException as error:
        _note(result, record, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error=str(error))
        raise
    finally:
        trackers.finish()
    return result


def _do(recipe: Recipe, step: Step, result: RunResult, trackers: Trackers, quiet: bool) -> None:
    """One stage: its record from before, or its work."""
    directory = result.output / step.directory
    if step.done:
        figures = _record(directory)["figures"]
        result.reused.append(step.directory)
    else:
        figures = _work(recipe, step, result, trackers, quiet)
    result.stages[step.directory] = figures
    if step.stage.gives:
        result.model = str(directory / MODEL)
    if step.stage.gives == "dense":
        result.base = result.model


def _work(recipe: Recipe, step: Step, result: RunResult, trackers: Trackers, quiet: bool) -> dict[str, Any]:
    """Do a stage in a directory beside, check what it made, put it in place."""

    def log(figures: Mapping[str, Any], at: int | None) -> None:
        trackers.log({f"{step.directory}/{name}": value for name, value in figures.items()}, at)

    scratch = result.output / SCRATCH / step.fingerprint[:16]
    started = time.perf_counter()
    with staged(result.output / step.directory) as partial:
        work = Work(recipe, result.model, partial, scratch, result.base, dict(result.stages), quiet, log)
        figures = step.stage.run(work)
        if step.stage.gives:
            figures |= verified(work.target, step.directory)
        figures["seconds"] = time.perf_counter() - started
        log(flat(figures), None)
        write_json(partial / STAGE_NAME, {"kind": step.stage.kind, "fingerprint": step.fingerprint, "figures": figures})
    shutil.rmtree(scratch, ignore_errors=True)
    with suppress(OSError):
        scratch.parent.rmdir()
    return figures


def verified(model: Path, name: str) -> dict[str, Any]:
    """How many zeros a stage's model keeps; empty for a model without masks.

    Raises:
        FailedCheckError: a zero is lost, or a mask is not the recorded one.
    """
    if not any((model / name).is_file() for name in (SPARSITY_NAME, ADAPTER_NAME)):
        return {}
    outcome = verify_product(model)
    if outcome.faults:
        raise FailedCheckError(f"stage {name} lost what it should keep: {outcome.faults[0]}")
    return {"zeros": outcome.zeros, "pruned": outcome.pruned}


def _output(recipe: Recipe) -> Path:
    """The output directory, if it is new, empty, or of an earlier run."""
    output = Path(recipe.output).expanduser().resolve()
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / RUN_NAME).is_file())):
        raise BarberError(f"output {recipe.output} holds something that is no run of a recipe")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BarberError(f"output {recipe.output} cannot be written: {error.strerror}") from None
    return output


def _record(directory: Path) -> dict[str, Any]:
    path = directory / STAGE_NAME
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _note(result: RunResult, record: dict[str, Any], status: str, running: str | None = None, error: str = "") -> None:
    """Write `run.json` beside and put it in place."""
    content = {
        **record, "status": status, "running": running, "error": error or None, "finished": None if running else _now(),
        **{key: value for key, value in asdict(result).items() if key != "output"},
    }  # fmt: skip
    beside = result.output / (RUN_NAME + ".partial")
    write_json(beside, content)
    beside.replace(result.output / RUN_NAME)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings as one level of plain values."""
    found: dict[str, Any] = {"model": recipe.model}
    for key, value in recipe.calibration.model_dump().items():
        found[f"calibration/{key}"] = value if isinstance(value, int | float | str) else str(value)
    for number, stage in enumerate(recipe.stages, 1):
        for key, value in stage.model_dump().items():
            found[f"{number:02d}-{stage.kind}/{key}"] = value if isinstance(value, int | float) else str(value)
    return found
