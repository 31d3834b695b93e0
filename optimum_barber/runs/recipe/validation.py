"""A recipe file checked whole, before any work: every fault with its line."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ...base.errors import BarberError, unknown_name
from ...base.fields import one_line
from ...base.files import is_there
from ...text.sources import text_faults, text_files
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

    def __init__(self, name: str, document: Document, faults: Iterable[Fault]) -> None:
        lines: dict[str, int] = {}
        for fault in faults:
            line = document.line(fault.path) or 0
            lines.setdefault(f"{name}:{line}: {_place(fault.path)}{fault.message}", line)
        super().__init__("\n".join(sorted(lines, key=lines.__getitem__)))


def _place(path: Path_) -> str:
    """Return a path as a reader says it: `stages 2, quantize.bits: `."""
    parts = [str(part) for part in path]
    if len(parts) > 1 and parts[0] == "stages":
        number, setting = int(parts[1]) + 1, ".".join(parts[2:])
        return f"stages {number}, {setting}: " if setting else f"stages {number}: "
    return ".".join(parts) + ": " if parts else ""


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
    apply_settings(document.content, settings)
    faults: list[Fault] = []
    recipe = _recipe(document.content, faults)
    if recipe is not None and not faults:
        faults += [*_order_faults(recipe), *_file_faults(recipe), *_stage_faults(recipe)]
    if recipe is None or faults:
        raise RecipeError(str(path), document, faults)
    return recipe


def _recipe(content: Mapping[str, Any], faults: list[Fault]) -> Recipe | None:
    """Return the recipe that the content of a file means; the faults of single settings go into `faults`."""
    content = dict(content)
    variables = content.pop("variables", None) or {}
    values, unknown = substitute(content, variables)
    faults += [Fault(path, message) for path, message in unknown]
    values["variables"] = variables
    if isinstance(values.get("stages"), list):
        stages = [_stage(item, ("stages", index), faults) for index, item in enumerate(values["stages"])]
        values["stages"] = [stage for stage in stages if stage is not None]
    return _validated(Recipe, values, (), faults)


def _stage(item: Any, path: Path_, faults: list[Fault]) -> Stage | None:
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        faults.append(Fault(path, "a stage is its kind, alone or with its settings: '- merge' or '- prune: {...}'"))
        return None
    kind, settings = next(iter(item.items()))
    try:
        stage = STAGES[kind]
    except BarberError as error:
        faults.append(Fault(path, str(error)))
        return None
    if not isinstance(settings, dict | None):
        faults.append(Fault((*path, kind), f"{settings!r} is not legal: settings by name"))
        return None
    return _validated(stage, settings or {}, (*path, kind), faults)


def _validated(model: Any, values: Mapping[str, Any], path: Path_, faults: list[Fault]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults += [Fault((*path, *fault["loc"]), _describe(fault, model)) for fault in error.errors()]
        return None


def _describe(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, BarberError):
        return str(cause)
    if fault["type"] == "extra_forbidden":
        return str(unknown_name("setting", str(fault["loc"][-1]), _fields(model, fault["loc"][:-1])))
    if fault["type"] == "missing":
        return "is missing"
    return f"{fault['input']!r} is not legal: {fault['msg'].removeprefix('Value error, ')}"


def _fields(model: Any, path: Sequence[str | int]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def _order_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault for each stage that cannot begin with what the stages before it leave."""
    makers = {"dense": "the dense model"}
    for kind, made in STAGES.items():
        if made.gives and made.gives != "dense":
            makers[made.gives] = kind
    state = "dense"
    for index, stage in enumerate(recipe.stages):
        if state not in stage.follows:
            legal = " or ".join(map(makers.__getitem__, stage.follows))
            yield Fault(("stages", index), f"{stage.kind} cannot work on a model that is {state}: it follows {legal}")
        state = stage.gives or state


def _file_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault for each file that is missing, and for each that lies in the output or holds it."""
    texts = list(recipe.calibration.texts)
    for index, text in enumerate(texts):
        for message in text_faults([text]):
            yield Fault(("calibration", "texts", index), message)
    read = [recipe.model]
    for index, stage in enumerate(recipe.stages):
        missing = [f"{name!r} does not exist" for name in stage.files() if not is_there(name)]
        for message in (*missing, *text_faults(stage.texts())):
            yield Fault(("stages", index, stage.kind), message)
        read += stage.files()
        texts += stage.texts()
    yield from _overlaps(recipe.output, [*read, *map(str, text_files(texts))])


def _overlaps(name: str, read: Iterable[str]) -> Iterator[Fault]:
    output = Path(name).expanduser().resolve()
    for path in (Path(source).expanduser() for source in read):
        source = path.resolve()
        if is_there(path) and (source in (output, *output.parents) or output in source.parents):
            yield Fault(("output",), f"{name} and the input {source} lie within each other")


def _stage_faults(recipe: Recipe) -> Iterator[Fault]:
    for index, stage in enumerate(recipe.stages):
        path: Path_ = ("stages", index, stage.kind, stage.first)
        try:
            stage.check(recipe, recipe.stages[:index])
        except ValidationError as error:
            yield Fault(path, str(one_line(error)))
        except BarberError as error:
            for line in str(error).splitlines():
                yield Fault(path, line)
