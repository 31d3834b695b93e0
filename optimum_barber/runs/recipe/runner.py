"""Running a recipe: every stage is kept with its fingerprint, so that a second run redoes only what changed."""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...base.errors import FailedCheckError
from ...base.files import digest, path_digest, write_json
from ...base.output import output_lock, staged
from ...base.version import __version__
from ...checkpoints.names import ADAPTER_MASKS_NAME, EXPERTS_NAME, ORDER_NAME, SPARSITY_NAME, STRUCTURE_NAME
from ...checkpoints.write import software
from ...models.device import choose_device
from ...models.loading import empty_model, load_config, resolve_model
from ..cells import Teller, open_directory, tell_nobody
from ..fingerprint import of_model, stated_precision
from ..verify import verify_product
from .document import find_recipe
from .schema import Recipe
from .stage import MODEL, RUN_NAME, STAGE_NAME, Stage, StageContext, flat, read_stage
from .tracking import Trackers
from .validation import read_recipe

SCRATCH = ".unfinished"
RECORDS = (SPARSITY_NAME, ADAPTER_MASKS_NAME, STRUCTURE_NAME, EXPERTS_NAME, ORDER_NAME)


@dataclass
class Step:
    """A stage, the name of its directory, and whether that holds its result already."""

    directory: str
    stage: Stage
    fingerprint: str
    done: bool = False


@dataclass
class RunResult:
    """The results of a run.

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
    """Return all stages with their fingerprints, which follow from the settings alone."""
    steps: list[Step] = []
    model = of_model(recipe.model)
    for number, stage in enumerate(recipe.stages, 1):
        before = [step.fingerprint for step in steps]
        fingerprint = _fingerprint_of(recipe, stage, model if stage.gives else digest([model, *before]))
        if stage.gives:
            model = fingerprint
        directory = f"{number:02d}-{stage.kind}"
        path = Path(recipe.output).expanduser() / directory
        complete = not stage.gives or (path / MODEL).is_dir()
        done = complete and read_stage(path).get("fingerprint") == fingerprint
        steps.append(Step(directory, stage, fingerprint, done))
    return steps


def check_stages(recipe: Recipe, steps: Sequence[Step]) -> None:
    """Check the stages that are to be done against the recipe's model, up to one that gives it other shapes."""
    model = None
    for index, step in enumerate(steps):
        if step.stage.reshapes:
            return
        if step.stage.needs_model and not step.done:
            if model is None:
                model = empty_model(load_config(resolve_model(recipe.model)))
            step.stage.check_model(model, recipe.stages[:index])


def _fingerprint_of(recipe: Recipe, stage: Stage, start: str) -> str:
    """Digest all that decides the result of a stage, the content of the files and texts that it reads too."""
    shared = recipe.model_dump(include={"calibration", "device", "dtype"})
    shared["precision"] = stated_precision(recipe.precision, choose_device(recipe.device))
    files = [path_digest(name) for name in (*recipe.calibration.texts, *stage.texts(), *stage.files())]
    return digest([__version__, stage.kind, stage.model_dump_json(), shared, start, files])


def run_recipe(
    name: str | Path,
    settings: Sequence[str] = (),
    *,
    track: Sequence[str] = (),
    quiet: bool = False,
    tell: Teller = tell_nobody,
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
        BarberError: another run is at work in the output, or a stage does not fit the model.
        FailedCheckError: a stage lost a zero.
    """
    recipe = read_recipe(find_recipe(str(name)), settings)
    output = open_directory(recipe.output, RUN_NAME, "run of a recipe")
    with output_lock(output):
        steps = steps_of(recipe)
        check_stages(recipe, steps)
        trackers = Trackers([*recipe.track, *track], recipe.name, output / "tracking", recipe.flat_settings())
        run = _Run(recipe, str(name), output, trackers, quiet)
        try:
            for step in steps:
                run.note("running", step.directory)
                run.do(step)
                tell(step.directory, run.result.stages[step.directory], step.done)
            run.note("finished")
        except BaseException as error:
            run.note("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error=str(error))
            raise
        finally:
            trackers.finish()
    return run.result


class _Run:
    """A run of a recipe and its results so far."""

    def __init__(self, recipe: Recipe, name: str, output: Path, trackers: Trackers, quiet: bool) -> None:
        self.recipe = recipe
        self.trackers = trackers
        self.quiet = quiet
        self.result = RunResult(recipe.model, output, base=recipe.model)
        self.settings = recipe.flat_settings()
        self.record = {
            "name": recipe.name, "recipe": name, "started": _now(), "software": software(), "settings": self.settings,
        }  # fmt: skip

    def note(self, status: str, running: str | None = None, error: str = "") -> None:
        """Bring `run.json` up to date."""
        results = asdict(self.result)
        del results["output"]
        finished = None if running else _now()
        content = {**self.record, "status": status, "running": running, "error": error or None, "finished": finished}
        write_json(self.result.output / RUN_NAME, {**content, **results})

    def do(self, step: Step) -> None:
        """Do one stage, or take its figures from an earlier run."""
        result, directory = self.result, self.result.output / step.directory
        if step.done:
            figures = read_stage(directory)["figures"]
            result.reused.append(step.directory)
        else:
            figures = self._work(step, directory)
        result.stages[step.directory] = figures
        if step.stage.gives:
            result.model = str(directory / MODEL)
        if step.stage.gives == "dense":
            result.base = result.model

    def _work(self, step: Step, directory: Path) -> dict[str, Any]:

        def log(figures: Mapping[str, Any], at: int | None) -> None:
            self.trackers.log({f"{step.directory}/{name}": value for name, value in figures.items()}, at)

        scratch = self.result.output / SCRATCH / step.fingerprint[:16]
        started = time.perf_counter()
        with staged(directory) as partial:
            context = StageContext(
                self.recipe, self.result.model, self.result.base, partial, scratch, dict(self.result.stages),
                self.settings, self.quiet, log,
            )  # fmt: skip
            figures = step.stage.run(context)
            if step.stage.gives:
                figures |= _verified(context.output_model, step.directory)
            figures["seconds"] = time.perf_counter() - started
            log(flat(figures), None)
            record = {"kind": step.stage.kind, "fingerprint": step.fingerprint, "figures": figures}
            write_json(partial / STAGE_NAME, record)
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            scratch.parent.rmdir()
        return figures


def _verified(model: Path, name: str) -> dict[str, Any]:
    """Return how many zeros a stage's model keeps; raises FailedCheckError if it is not what its record says."""
    if not any((model / record).is_file() for record in RECORDS):
        return {}
    outcome = verify_product(model, weights=False)
    if outcome.faults:
        raise FailedCheckError(f"stage {name} lost what it should keep: {outcome.faults[0]}")
    return {"zeros": outcome.zeros, "pruned": outcome.pruned} if outcome.modules else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
