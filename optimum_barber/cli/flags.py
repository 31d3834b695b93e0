"""Flags out of the fields of settings, and settings out of the flags that are given."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError

MODEL = "hub id, directory, GGUF file, or installed:PACKAGE"
FLAGS = {
    "method": ["--rebuild"], "reconstruct_method": ["--reconstruct"], "rebuilds": ["--rebuilds", "--rebuilders"],
    "texts": ["--calibration"],
}  # fmt: skip
METAVARS = {
    "evaluation": "TEXT", "ignore": "GLOB", "pattern": "N:M", "patterns": "N:M", "rebuild_ratio": "R", "remove": "R",
    "remove_channels": "R", "remove_heads": "R", "sparsity": "R", "start": "TEXT", "structure": "FILE", "tasks": "TASK",
    "texts": "TEXT", "vary": "NAME=A,B,...",
}  # fmt: skip
REPEATED = ("texts", "ignore")  # lists that take a value at a time; the others take all of them at once
EXAMPLES = {
    "producer_args": "damping=0.05", "allocation_args": "spread=0.05", "scorer_args": "norm_gain=true",
    "rebuild_args": "rounds=2", "vary": "rounds=1,2,4",
}  # fmt: skip


def number(value: str) -> float | str:
    """A float where it is one; the settings know what is legal."""
    try:
        return float(value)
    except ValueError:
        return value


def whole(value: str) -> int | str:
    """An int where it is one; the settings know what is legal."""
    try:
        return int(value)
    except ValueError:
        return value


def add_fields(group: Any, model: type[BaseModel], names: Iterable[str] | None = None, prefix: str = "") -> None:
    """Add a flag for every field among `names` (None: for all that are no settings of their own).

    A flag that is not given leaves nothing in the namespace, so that the model's default counts.

    Args:
        group: parser or argument group.
        model: settings whose fields become flags.
        names: of fields, in the order of the help.
        prefix: before the field's name, in the flag and in the namespace.
    """
    for name in model.model_fields if names is None else names:
        field = model.model_fields[name]
        if not _is_settings(field):
            flags = FLAGS.get(prefix + name, ["--" + (prefix + _flag_name(name)).replace("_", "-")])
            group.add_argument(
                *flags, dest=prefix + name, default=argparse.SUPPRESS, help=_help(name, field), **_shape(name, field)
            )


def _is_settings(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _flag_name(name: str) -> str:
    return name.removesuffix("s") if name.endswith("_args") else name


def _shape(name: str, field: FieldInfo) -> dict[str, Any]:
    """The arguments of `add_argument` that depend on the field's type."""
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
    """What reads a value, or each of a list; text where the settings read it themselves."""
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
    """The field's description with its default."""
    text = (field.description or "").replace("%", "%%")
    default = field.get_default(call_default_factory=True)
    if isinstance(default, list):
        default = " ".join(map(str, default))
    shown = isinstance(default, str | int | float) and default is not False and default != ""
    if shown and "default" not in text:
        text += f" (default: {default})"
    once = name in REPEATED or get_origin(field.annotation) is dict
    return f"{text}; repeatable" if once else text


def flag_values(args: argparse.Namespace, model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The fields of a model that flags gave a value.

    Raises:
        BarberError: a KEY=VALUE of another form.
    """
    settings: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if prefix + name in args:
            value = getattr(args, prefix + name)
            settings[name] = pairs(name, value) if get_origin(field.annotation) is dict else value
    return settings


def pairs(name: str, values: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE options of the field `name` as a mapping.

    Raises:
        BarberError: one of another form.
    """
    mapping = {}
    for pair in values:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            flag = _flag_name(name).replace("_", "-")
            raise BarberError(f"{flag} {pair!r} is not legal: KEY=VALUE, such as {EXAMPLES[name]}")
        mapping[key] = value
    return mapping


def add_run(parser: Any, output: str, metavar: str = "DIR", overwrite: bool = True, model: bool = True) -> None:
    """Add what all commands that write take: the model, `--output`, `--overwrite` and `--quiet`.

    Args:
        parser: of the command.
        output: help of `--output`.
        metavar: of `--output`.
        overwrite: False where a second run goes on in the same directory.
        model: False where the command reads something else.
    """
    if model:
        parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=output)
    if overwrite:
        parser.add_argument("--overwrite", action="store_true", help=f"replace what {metavar} holds, at the very end")
    parser.add_argument("--quiet", action="store_true", help="print no progress bars, warnings or results")


def add_calibration(group: Any, names: Iterable[str] | None = None) -> None:
    """Add the flags of the calibration windows."""
    add_fields(group, CalibrationConfig, names)


def check_whole(args: argparse.Namespace, name: str, least: int) -> None:
    """Refuse a flag's value unless it is missing, or an integer of at least `least`.

    Raises:
        BarberError: it is neither.
    """
    value = getattr(args, name)
    if value is None or (isinstance(value, int) and value >= least):
        return
    raise BarberError(f"{name.replace('_', ' ')} {value} is not legal: a whole number from {least}")


class _HelpAll(argparse.Action):
    """Print the help with the flags that the short one leaves out.

    Args:
        hidden: text of every flag and group that the short help leaves out, by where it stands.
    """

    def __init__(self, *args: Any, hidden: list[tuple[Any, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, default=argparse.SUPPRESS, **kwargs)
        self.hidden = hidden

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        for holder, attribute, text in self.hidden:
            setattr(holder, attribute, text)
        parser.print_help()
        parser.exit()


def shorten_help(parser: argparse.ArgumentParser, daily: Iterable[str]) -> None:
    """Leave all flags but `daily` (names in the namespace) to `--help-all`."""
    hidden: list[tuple[Any, str, str]] = []
    parser.add_argument("--help-all", action=_HelpAll, hidden=hidden, help="show all flags, by method, and exit")
    for action in parser._actions:
        if action.dest not in {*daily, "help", "help_all"}:
            hidden.append((action, "help", str(action.help)))
            action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        if group.description:
            hidden.append((group, "description", group.description))
            group.description = None
