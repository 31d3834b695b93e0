"""Types of options that leave the complaint about a bad value to whoever knows what is legal."""

import argparse
from collections.abc import Container
from typing import Any

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError


def number(value: str) -> float | str:
    """A float where it is one."""
    try:
        return float(value)
    except ValueError:
        return value


def whole(value: str) -> int | str:
    """An int where it is one."""
    try:
        return int(value)
    except ValueError:
        return value


def pairs(flag: str, given: list[str], example: str) -> dict[str, str]:
    """KEY=VALUE options as a mapping.

    Raises:
        BarberError: one of another form.
    """
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise BarberError(f"{flag} {pair!r} is not legal: KEY=VALUE, such as {example}")
        found[key] = value
    return found


def add_calibration(parser: Any, leave: Container[str] = ()) -> None:
    """The flags of a calibration, flat, for a parser or one of its groups."""
    fields = CalibrationConfig.model_fields
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="TEXT", help=f"repeatable: {fields['texts'].description}"
    )
    kinds = {"text_field": ("NAME", str), "samples": ("N", whole), "sequence_length": ("N", whole)}
    for name, (metavar, kind) in kinds.items():
        if name in leave:
            continue
        flag, default, said = "--" + name.replace("_", "-"), fields[name].default, fields[name].description
        said = said if default is None else f"{said} (default: {default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, type=kind, help=said)
