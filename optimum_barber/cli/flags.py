"""Flags out of the fields of settings, and settings out of the flags that are given."""

import argparse
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from ..base.errors import BarberError
from ..base.flag_names import PREFIXES, REPEATED, flag_name, flags_for

MODEL = "hub id, directory, GGUF file, or installed:PACKAGE"
LENGTH = "tokens per window (default: 2048, or the model's maximum if that is less)"
METAVARS = {
    "evaluation": "TEXT", "ignore": "GLOB", "pattern": "N:M", "patterns": "N:M", "rebuild_ratio": "R", "remove": "R",
    "remove_channels": "R", "remove_heads": "R", "sparsity": "R", "start": "TEXT", "structure": "FILE", "tasks": "TASK",
    "texts": "TEXT", "vary": "NAME=A,B,...",
}  # fmt: skip
EXAMPLES = {
    "producer_args": "damping=0.05", "allocation_args": "spread=0.05", "scorer_args": "norm_gain=true",
    "rebuild_args": "rounds=2", "vary": "rounds=1,2,4",
}  # fmt: skip


def _reads(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader that leaves other text to the settings, which know what is legal."""

    def read(value: str) -> Any:
        try:
            return kind(value)
        except ValueError:
            return value

    return read


number, whole = _reads(float), _reads(int)


def add_fields(group: Any, model: type[BaseModel], names: Iterable[str] | None = None, prefix: str = "") -> None:
    """Add a flag for every field among `names`, or for all that are not nested settings.

    A flag that is not given leaves nothing in the namespace, so that the model's default counts.
    """
    for name in model.model_fields if names is None else names:
        field = model.model_fields[name]
        if not isinstance(field.default, BaseModel):
            flags = flags_for(name, prefix)
            group.add_argument(
                *flags, dest=prefix + name, default=argparse.SUPPRESS, help=_help(name, field), **_shape(name, field)
            )


def _shape(name: str, field: FieldInfo) -> dict[str, Any]:
    if field.annotation is bool:
        return {"action": "store_true"}
    if get_origin(field.annotation) is dict:
        return {"action": "append", "metavar": METAVARS.get(name, "KEY=VALUE")}
    reader = _reader(field)
    letter = {whole: "N", number: "R"}.get(reader, "NAME")
    shape: dict[str, Any] = {"type": reader, "metavar": METAVARS.get(name, letter), "required": field.is_required()}
    if get_origin(field.annotation) is list:
        shape |= {"action": "append"} if name in REPEATED else {"nargs": "+"}
    return shape


def _reader(field: FieldInfo) -> Any:
    annotation: Any = field.annotation
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Annotated:
        annotation, *validators = get_args(annotation)
        if any(isinstance(validator, BeforeValidator) for validator in validators):
            return str
    readers: dict[Any, Any] = {int: whole, int | None: whole, float: number}
    return readers.get(annotation, str)


def _help(name: str, field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    default = field.get_default(call_default_factory=True)
    if isinstance(default, list):
        default = " ".join(map(str, default))
    shown = isinstance(default, str | int | float) and default is not False and default != ""
    if shown and "default" not in text:
        text += f" (default: {default})"
    once = name in REPEATED or get_origin(field.annotation) is dict
    return f"{text}; repeatable" if once else text


def flag_values(
    args: argparse.Namespace, model: type[BaseModel], prefix: str = "", hidden: Container[str] = ()
) -> dict[str, Any]:
    """Return the fields that have a value on the command line, nested settings among them.

    A field hides one of the same name in nested settings: `sweep --samples` is an axis, not `calibration.samples`.

    Raises:
        BarberError: a KEY=VALUE of another form.
    """
    settings: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            nested = flag_values(args, type(field.default), PREFIXES.get(name, ""), model.model_fields)
            if nested:
                settings[name] = nested
        elif prefix + name in args and name not in hidden:
            value = getattr(args, prefix + name)
            settings[name] = _pairs(name, value) if get_origin(field.annotation) is dict else value
    return settings


def _pairs(name: str, values: Sequence[str]) -> dict[str, str]:
    mapping = {}
    for pair in values:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            flag = flag_name(name).replace("_", "-")
            raise BarberError(f"{flag} {pair!r} is not legal: KEY=VALUE, such as {EXAMPLES[name]}")
        mapping[key] = value
    return mapping


def add_run(parser: Any, output: str, metavar: str = "DIR", overwrite: bool = True, model: bool = True) -> None:
    """Add the flags of all commands that write; `output` is the help of `--output`."""
    if model:
        parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=output)
    if overwrite:
        parser.add_argument("--overwrite", action="store_true", help=f"replace {metavar} when the run succeeds")
    parser.add_argument("--quiet", action="store_true", help="print no progress bars, warnings or results")


def check_whole(args: argparse.Namespace, name: str, least: int) -> None:
    """Refuse a flag's value that is neither missing nor an integer of at least `least`."""
    value = getattr(args, name)
    if value is not None and not (isinstance(value, int) and value >= least):
        raise BarberError(f"{name.replace('_', ' ')} {value} is not legal: a whole number from {least}")


def shorten_help(parser: argparse.ArgumentParser, daily: Iterable[str]) -> None:
    """Leave all flags but `daily` (names in the namespace) to `--help-all`."""
    help_all: Any = parser.add_argument("--help-all", action="version", help="show all flags and exit")
    help_all.version = parser.format_help()
    for group in parser._action_groups:
        group.description = None
    for action in parser._actions:
        if action.dest not in {*daily, "help", "help_all"}:
            action.help = argparse.SUPPRESS
