"""`${name}` in a recipe, and `--set path=value` over it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.errors import BarberError, unknown_name
from .document import Path_, parse_value

VARIABLE = re.compile(r"\$\{([^}]*)\}")
TOP_LEVEL = ("name", "model", "variables", "calibration", "device", "dtype", "output", "track")


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
        first, *rest = path.split(".")
        holder, rest = _holder(content, first, rest, setting)
        for key in rest[:-1]:
            holder = holder.setdefault(key, {})
            if not isinstance(holder, dict):
                raise BarberError(f"set {setting!r}: {key!r} holds no settings")
        holder[rest[-1]] = parse_value(value)


def _holder(content: dict[str, Any], first: str, rest: list[str], setting: str) -> tuple[dict[str, Any], list[str]]:
    if first in TOP_LEVEL:
        return content, [first, *rest]
    kind, number = re.fullmatch(r"([^\[]*)(?:\[(\d+)\])?", first).groups() if "]" in first else (first, None)  # type: ignore[union-attr]
    stages = [stage for stage in content.get("stages") or () if isinstance(stage, dict) and kind in stage]
    if not stages or not rest:
        kinds = [key for stage in content.get("stages") or () if isinstance(stage, dict) for key in stage]
        raise BarberError(f"set {setting!r}: {unknown_name('place', first, [*TOP_LEVEL, *kinds])}")
    if number is None and len(stages) > 1:
        raise BarberError(f"set {setting!r}: there are {len(stages)} {kind} stages: {kind}[1] to {kind}[{len(stages)}]")
    index = int(number or 1)
    if not 1 <= index <= len(stages):
        raise BarberError(f"set {setting!r}: there are {len(stages)} {kind} stages")
    stage = stages[index - 1]
    stage[kind] = stage[kind] if isinstance(stage[kind], dict) else {}
    return stage[kind], rest


def substitute(value: Any, variables: Mapping[str, Any], path: Path_ = ()) -> tuple[Any, list[tuple[Path_, str]]]:
    """`value` with every `${name}` replaced, and a fault for each unknown name.

    A string that is nothing but `${name}` takes the variable's type.
    """
    faults: list[tuple[Path_, str]] = []

    def inner(value: Any, path: Path_) -> Any:
        if isinstance(value, dict):
            return {key: inner(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [inner(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        names = VARIABLE.findall(value)
        unknown = [name for name in names if name not in variables]
        if unknown:
            faults.extend((path, str(unknown_name("variable", name, variables))) for name in unknown)
            return value
        whole = VARIABLE.fullmatch(value)
        return variables[names[0]] if whole else VARIABLE.sub(lambda match: str(variables[match[1]]), value)

    return inner(value, path), faults
