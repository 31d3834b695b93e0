"""`${name}` in a recipe, and `--set path=value` over it."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ...base.errors import BarberError, unknown_name
from .document import Path_, parse_value

VARIABLE = re.compile(r"\$\{([^}]*)\}")
NUMBERED = re.compile(r"(.*)\[(\d+)\]")  # the stage KIND[NUMBER]
TOP_LEVEL = ("name", "model", "variables", "calibration", "device", "dtype", "precision", "output", "track")


def apply_settings(content: dict[str, Any], settings: Sequence[str]) -> None:
    """Lay `path=value` settings over a recipe's content, in place.

    A path begins with a top-level key (`calibration.samples`, `variables.text`, `model`) or with a stage's
    kind (`prune.sparsity`); of stages of the same kind `evaluate[2]` is the second.

    Raises:
        BarberError: no such place, or not of the form path=value.
    """
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or not path:
            raise BarberError(f"set {setting!r} is not legal: path=value, such as prune.sparsity=0.6")
        try:
            _set(content, path.split("."), parse_value(value))
        except BarberError as error:
            raise BarberError(f"set {setting!r}: {error}") from None


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    place = content
    if keys[0] not in TOP_LEVEL:
        stages = [stage for stage in content.get("stages") or () if isinstance(stage, dict)]
        if len(keys) == 1:
            raise _no_place(keys[0], stages)
        place, keys = _stage_settings(stages, keys[0]), keys[1:]
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise BarberError(f"{key!r} holds no settings")
    place[keys[-1]] = value


def _stage_settings(stages: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the settings of the stage KIND or KIND[NUMBER], made if it has none."""
    kind, number = name, None
    match = NUMBERED.fullmatch(name)
    if match:
        kind, number = match.groups()
    alike = [stage for stage in stages if kind in stage]
    if not alike:
        raise _no_place(name, stages)
    if number is None and len(alike) > 1:
        raise BarberError(f"there are {len(alike)} {kind} stages: {kind}[1] to {kind}[{len(alike)}]")
    index = int(number or 1)
    if not 1 <= index <= len(alike):
        raise BarberError(f"there are {len(alike)} {kind} stages")
    stage = alike[index - 1]
    if not isinstance(stage[kind], dict):
        stage[kind] = {}
    settings: dict[str, Any] = stage[kind]
    return settings


def _no_place(name: str, stages: list[dict[str, Any]]) -> BarberError:
    return unknown_name("place", name, [*TOP_LEVEL, *chain.from_iterable(stages)])


def substitute(value: Any, variables: Mapping[str, Any], path: Path_ = ()) -> tuple[Any, list[tuple[Path_, str]]]:
    """Return `value` with every `${name}` replaced, and a fault for each unknown name.

    A string that is nothing but `${name}` takes the variable's type.
    """
    faults: list[tuple[Path_, str]] = []
    return _substituted(value, variables, path, faults), faults


def _substituted(value: Any, variables: Mapping[str, Any], path: Path_, faults: list[tuple[Path_, str]]) -> Any:
    if isinstance(value, str):
        return _filled(value, variables, path, faults)
    if isinstance(value, dict):
        return {key: _substituted(item, variables, (*path, key), faults) for key, item in value.items()}
    if isinstance(value, list):
        return [_substituted(item, variables, (*path, index), faults) for index, item in enumerate(value)]
    return value


def _filled(text: str, variables: Mapping[str, Any], path: Path_, faults: list[tuple[Path_, str]]) -> Any:
    names, unknown = VARIABLE.findall(text), 0
    for name in names:
        if name not in variables:
            faults.append((path, str(unknown_name("variable", name, variables))))
            unknown += 1
    if unknown:
        return text
    if VARIABLE.fullmatch(text):
        return variables[names[0]]
    return VARIABLE.sub(lambda match: str(variables[match[1]]), text)
