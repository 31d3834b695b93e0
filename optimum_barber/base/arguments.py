"""Keyword-only arguments of producers, allocations and scorers, as a user writes them."""

import inspect
from collections.abc import Callable
from typing import Any

from .errors import BarberError


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
