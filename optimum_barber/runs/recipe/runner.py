"""Running a recipe: every stage is kept with its fingerprint, so that a second run redoes only what changed."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...base.errors import FailedCheckError
from ...base.files import write_json
from ...base.output import output_lock, staged
from ...checkpoints.names import ADAPTER_MASKS_NAME, SPARSITY_NAME, STRUCTURE_NAME
from ...checkpoints.write import software
from ..verify import verify_product
from . import fingerprint
from .directory import STAGE_NAME, now, open_output, read_stage, write_run
from .schema import Recipe
from .shipped import find_recipe
from .stage import MODEL, Stage, Work
from .stages.evaluate import flat
from .tracking import Trackers
from .validation import read_recipe

SCRATCH = ".unfinished"
Teller = Callable[[str, dict[str, Any], bool], None]


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


def steps_of(recipe: Recipe) -> list[Step]:
    """All stages with their fingerprints, which follow from the settings alone."""
    steps: list[Step] = []
    model = fingerprint.of_model(recipe.model)
    for number, stage in enumerate(recipe.stages, 1):
        before = model if stage.gives else fingerprint.digest([model, *(step.fingerprint for step in steps)])
        found = fingerprint.of_stage(recipe, stage, before)
        model = found if stage.gives else model
        directory = f"{number:02d}-{stage.kind}"
        held = Path(recipe.output).expanduser() / directory
        done = read_stage(held).get("fingerprint") == found and (not stage.gives or (held / MODEL).is_dir())
        steps.append(Step(directory, stage, found, done))
    return steps


def run_recipe(
    name: str | Path,
    settings: Sequence[str] = (),
    *,
    track: Sequence[str] = (),
    quiet: bool = False,
    tell: Teller = lambda directory, figures, reused: None,
) -> RunResult:
    """Run a recipe; stages whose result is there already are not done again.

    Args:
        name: a YAML file, or the name of a shipped recipe.
        settings: `path=value` over what the file says.
        track: trackers beside those of the recipe.
        quiet: no progress bars.
        tell: called after each stage with its directory, its figures, and whether they are from before.

    Raises:
        RecipeError: every fault of the recipe, before any work.
        BarberError: another run is at work in the output.
        FailedCheckError: a stage lost a zero.
    """
    recipe = read_recipe(find_recipe(str(name)), settings)
    output = open_output(recipe.output)
    with output_lock(output):
        return _run(recipe, str(name), output, track, quiet, tell)


def _run(recipe: Recipe, name: str, output: Path, track: Sequence[str], quiet: bool, tell: Teller) -> RunResult:
    steps = steps_of(recipe)
    trackers = Trackers([*recipe.track, *track], recipe.name, output / "tracking", flat_settings(recipe))
    result = RunResult(recipe.model, output, base=recipe.model)
    record = {"name": recipe.name, "recipe": name, "started": now(), "software": software(),
              "settings": flat_settings(recipe)}  # fmt: skip
    try:
        for step in steps:
            _note(result, record, "running", step.directory)
            _do(recipe, step, result, trackers, quiet)
            tell(step.directory, result.stages[step.directory], step.done)
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
        figures = read_stage(directory)["figures"]
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
        FailedCheckError: a zero is lost, a mask is not the recorded one, or a cut model has not the recorded shapes.
    """
    if not any((model / name).is_file() for name in (SPARSITY_NAME, ADAPTER_MASKS_NAME, STRUCTURE_NAME)):
        return {}
    outcome = verify_product(model, weights=False)
    if outcome.faults:
        raise FailedCheckError(f"stage {name} lost what it should keep: {outcome.faults[0]}")
    return {"zeros": outcome.zeros, "pruned": outcome.pruned} if outcome.modules else {}


def _note(result: RunResult, record: dict[str, Any], status: str, running: str | None = None, error: str = "") -> None:
    """Bring `run.json` up to date."""
    content = {
        **record, "status": status, "running": running, "error": error or None, "finished": None if running else now(),
        **{key: value for key, value in asdict(result).items() if key != "output"},
    }  # fmt: skip
    write_run(result.output, content)


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings as one level of plain values."""
    found: dict[str, Any] = {"model": recipe.model}
    for key, value in recipe.calibration.model_dump().items():
        found[f"calibration/{key}"] = value if isinstance(value, int | float | str) else str(value)
    for number, stage in enumerate(recipe.stages, 1):
        for key, value in stage.model_dump().items():
            found[f"{number:02d}-{stage.kind}/{key}"] = value if isinstance(value, int | float) else str(value)
    return found
