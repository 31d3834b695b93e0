"""Types of options that leave the complaint about a bad value to whoever knows what is legal."""

from typing import Any

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


def add_calibration(parser: Any) -> None:
    """The flag `--calibration` of a parser or one of its groups."""
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="TEXT",
        help="text or .jsonl file, c4, wikitext2, ptb, or pydoc, which is always there; repeatable (default: c4)",
    )  # fmt: skip
