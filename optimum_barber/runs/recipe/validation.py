"""A recipe file checked whole, before any work: every fault with its line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ...base.errors import BarberError, unknown_name
from ...base.files import is_there
from ...text.sources import TEXTS
from . import stages as _stages  # noqa: F401 - registers the stages
from .document import Document, Path_, read_document
from .schema import Recipe
from .stage import STAGES, Stage
from .variables import apply_settings, substitute


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a recipe, and where."""

    path: Path_
    message: str


class RecipeError(BarberError):
    """All faults of a recipe, one line each."""

    def __init__(self, name: str, document: Document, faults: Sequence[Fault]) -> None:
        located = sorted(((document.line(fault.path) or 0, fault) for fault in faults), key=lambda item: item[0])
        lines = [f"{name}:{line}: {where(fault.path)}{fault.message}" for line, fault in located]
        super().__init__("\n".join(dict.fromkeys(lines)))


def where(path: Path_) -> str:
    """A path as a reader says it: `stages 2, quantize.bits: `."""
    parts = [str(part) for part in path]
    if len(parts) > 1 and parts[0] == "stages":
        return f"stages {int(parts[1]) + 1}{', ' if parts[2:] else ''}{'.'.join(parts[2:])}: "
    return f"{'.'.join(parts)}: " if parts else ""


def read_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read, override, substitute and check a recipe.

    Args:
        path: the YAML file.
        settings: `path=value` over what the file says.

    Raises:
        RecipeError: every fault, with its line.
        BarberError: the file is no YAML, or a setting has no place.
    """
    document = read_document(path)
    if not isinstance(document.content, dict):
        raise BarberError(f"recipe {path} holds no settings: model, stages and output are needed")
    content = document.content
    apply_settings(content, settings)
    recipe, faults = check(content)
    if recipe is None or faults:
        raise RecipeError(str(path), document, faults)
    return recipe


def check(content: Mapping[str, Any]) -> tuple[Recipe | None, list[Fault]]:
    """The recipe, if nothing is wrong with it, and all faults."""
    variables = content.get("variables")
    filled, unknown = substitute({k: v for k, v in content.items() if k != "variables"}, variables or {})
    faults = [Fault(*item) for item in unknown]
    given = filled.get("stages")
    stages = [_stage(item, index, faults) for index, item in enumerate(given if isinstance(given, list) else ())]
    whole = {**filled, "variables": variables or {}}
    if isinstance(given, list):
        whole["stages"] = [stage for stage in stages if stage is not None]
    recipe = _validated(Recipe, whole, (), faults)
    if recipe is not None and not faults:
        faults += [*order_faults(recipe), *file_faults(recipe)]
        for index, stage in enumerate(recipe.stages):
            faults += [Fault(("stages", index, stage.kind, key), text) for key, text in stage.faults(recipe)]
    return (recipe if not faults else None), faults


def _stage(item: Any, index: int, faults: list[Fault]) -> Stage | None:
    """The stage that one item of `stages` means; its faults go into `faults`."""
    path: Path_ = ("stages", index)
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        faults.append(Fault(path, "a stage is its kind, alone or with its settings: '- merge' or '- prune: {...}'"))
        return None
    kind, settings = next(iter(item.items()))
    try:
        made = STAGES[kind]
    except BarberError as error:
        faults.append(Fault(path, str(error)))
        return None
    if not isinstance(settings, dict | None):
        faults.append(Fault((*path, kind), f"{settings!r} is not legal: settings by name"))
        return None
    return _validated(made, settings or {}, (*path, kind), faults)


def _validated(model: Any, given: Mapping[str, Any], path: Path_, faults: list[Fault]) -> Any:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        faults += [Fault((*path, *fault["loc"]), describe(fault, model)) for fault in error.errors()]
        return None


def describe(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    """A pydantic fault in our words; an unknown key with the nearest ones."""
    own = fault.get("ctx", {}).get("error")
    if isinstance(own, BarberError):
        return str(own)
    if fault["type"] == "extra_forbidden":
        return str(unknown_name("setting", str(fault["loc"][-1]), _fields(model, fault["loc"][:-1])))
    if fault["type"] == "missing":
        return "is missing"
    return f"{fault['input']!r} is not legal: {fault['msg'].removeprefix('Value error, ')}"


def _fields(model: Any, path: Sequence[str | int]) -> list[str]:
    """The settings that are known at `path` within a model."""
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return list(model.model_fields)


def order_faults(recipe: Recipe) -> list[Fault]:
    """Stages that cannot begin with what the stage before them leaves."""
    faults, state = [], "dense"
    makers = {made.gives: kind for kind, made in STAGES.items() if made.gives}
    for index, stage in enumerate(recipe.stages):
        if state not in stage.follows:
            able = " or ".join(makers.get(s, "nothing") if s != "dense" else "the dense model" for s in stage.follows)
            faults.append(
                Fault(("stages", index), f"{stage.kind} cannot work on a model that is {state}: it follows {able}")
            )
        state = stage.gives or state
    return faults


def file_faults(recipe: Recipe) -> list[Fault]:
    """Files that are missing, and an output that would overwrite what is read."""
    faults = [
        Fault(("calibration", "texts", index), f"text {text!r} is neither a file nor one of {', '.join(TEXTS)}")
        for index, text in enumerate(recipe.calibration.texts)
        if not known_text(text)
    ]
    read = [recipe.model, *recipe.calibration.texts]
    for index, stage in enumerate(recipe.stages):
        path: Path_ = ("stages", index, stage.kind)
        faults += [Fault(path, f"{name!r} does not exist") for name in stage.files() if not is_there(Path(name))]
        faults += [Fault(path, f"text {text!r} is neither a file nor one of {', '.join(TEXTS)}")
                   for text in stage.texts() if not known_text(text)]  # fmt: skip
        read += [*stage.files(), *stage.texts()]
    output = Path(recipe.output).expanduser().resolve()
    for held in (Path(name).expanduser().resolve() for name in read if is_there(Path(name).expanduser())):
        if output == held or held in output.parents or output in held.parents:
            faults.append(Fault(("output",), f"{recipe.output} and the input {held} lie within each other"))
    return faults


def known_text(text: str) -> bool:
    """Whether a text is a file or a registered name."""
    return text in TEXTS or (is_there(Path(text)) and Path(text).is_file())
