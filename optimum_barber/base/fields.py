"""What settings share: names out of a list, chains, arguments of functions. Imports neither torch nor transformers."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import AfterValidator, ValidationError

from .errors import BarberError, shown, unknown_name

NAMELESS = ("rebuild", "calibration")  # nested settings whose fields are named without them, as flags are
FAULTS = 10  # that are told
DTYPES = ("auto", "float32", "float16", "bfloat16")
PRECISIONS = ("auto", "highest", "high", "medium")  # of float32 matrix products


def one_of(kind: str, legal: Iterable[str]) -> AfterValidator:
    """Return a validator of names; its error gives the nearest legal names and the whole list."""

    def check(value: str) -> str:
        if value not in legal:
            raise unknown_name(kind, value, legal)
        return value

    return AfterValidator(check)


def checked_chain(argument: str, members: str, chain: str) -> str:
    """Return `chain`; raise BarberError if a link is empty."""
    if not all(chain.split("+")):
        raise BarberError(f"{argument} {chain!r} is not legal: {members} joined by '+', or 'none'")
    return chain


def parts_of(chain: str) -> list[str]:
    """Return the links of a chain; none for 'none'."""
    return [] if chain == "none" else chain.split("+")


def one_line(error: ValidationError) -> BarberError:
    """Return all faults of a configuration in one line."""
    faults = []
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        path = [str(part) for part in fault["loc"]]
        if len(path) > 1 and path[0] in NAMELESS:
            path = path[1:]
        where = ".".join(path)
        own = isinstance(fault.get("ctx", {}).get("error"), BarberError)
        faults.append(message if own else f"{where} {shown(fault['input'])} is not legal: {message}")
    lines = list(dict.fromkeys(faults))
    more = [f"and {len(lines) - FAULTS} more"] if len(lines) > FAULTS else []
    return BarberError("; ".join([*lines[:FAULTS], *more]))


def keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only arguments of a function, by name."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def parse_arguments(
    function: Callable[..., Any], name: str, values: dict[str, Any], kind: str = "producer"
) -> dict[str, Any]:
    """Check `values` against what a producer (or `kind`) takes; strings become the type of the argument's default.

    Raises:
        BarberError: an argument that it does not take, one that is missing, or a value of the wrong type.
    """
    legal = keyword_only(function)
    for key in values:
        if key not in legal:
            raise BarberError(f"{kind} {name!r} takes no argument {key!r}: it takes {', '.join(legal) or 'none'}")
    for key, parameter in legal.items():
        if parameter.default is parameter.empty and key not in values:
            raise BarberError(f"{kind} {name!r} needs the argument {key!r}")
    return {key: _typed(f"{kind} {name!r}", key, value, legal[key].default) for key, value in values.items()}


def _typed(taker: str, key: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str) or default is inspect.Parameter.empty:
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(default)(value)
    except (KeyError, ValueError):
        kind = type(default).__name__
        raise BarberError(f"argument {key}={value} of {taker} is no {kind}") from None
