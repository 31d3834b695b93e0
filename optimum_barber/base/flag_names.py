"""The names of flags for the fields of settings, and settings written as flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

FLAGS = {
    "method": ["--rebuild"], "reconstruct_method": ["--reconstruct"], "rebuilds": ["--rebuilds", "--rebuilders"],
    "texts": ["--calibration"],
}  # fmt: skip
PREFIXES = {"reconstruct": "reconstruct_"}  # nested settings whose flags begin with their name
REPEATED = ("texts", "ignore")  # lists that take a value at a time; the others take all of them at once


def flags_for(name: str, prefix: str = "") -> list[str]:
    """Return the spellings of a field's flag; `prefix` is that of the nested settings it is in."""
    return FLAGS.get(prefix + name, ["--" + (prefix + flag_name(name)).replace("_", "-")])


def flag_name(name: str) -> str:
    """Return the name of a field as its flag has it: a mapping is given one pair at a time."""
    return name.removesuffix("s") if name.endswith("_args") else name


def flags_of(settings: BaseModel, prefix: str = "") -> list[str]:
    """Write settings as flags: every field that was set, with absolute paths shortened to their last part.

    Left out are None and empty lists, for which no flag stands, and what is of the machine alone: the device, and a
    batch size that is chosen unless it is given.
    """
    flags: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            flags += flags_of(value, PREFIXES.get(name, ""))
        elif name in settings.model_fields_set and not _is_of_the_machine(settings, name):
            shown = settings.model_dump(include={name})[name]
            flags += _flag(name, flags_for(name, prefix)[0], shown)
    return flags


def _is_of_the_machine(settings: BaseModel, name: str) -> bool:
    return name == "device" or (name == "batch_size" and type(settings).model_fields[name].default is None)


def _flag(name: str, flag: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, Mapping):
        return _repeated(flag, [f"{key}={shortened(part)}" for key, part in value.items()])
    if not isinstance(value, list | tuple):
        return [flag, shortened(value)]
    values = [shortened(part) for part in value]
    if name in REPEATED:
        return _repeated(flag, values)
    return [flag, *values] if values else []


def _repeated(flag: str, values: list[str]) -> list[str]:
    flags: list[str] = []
    for value in values:
        flags += [flag, value]
    return flags


def shortened(value: Any) -> str:
    """Return a value as text; of an absolute path, which names folders of one machine, its last part."""
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text
