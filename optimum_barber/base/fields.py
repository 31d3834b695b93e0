"""What fields of configurations share: names out of a list, and chains. Imports neither torch nor transformers."""

from collections.abc import Iterable

from pydantic import AfterValidator, ValidationError

from .errors import BarberError, unknown_name

NAMELESS = ("rebuild", "calibration")  # nested settings whose fields are named without them, as flags are
DTYPES = ("auto", "float32", "float16", "bfloat16")


def one_of(kind: str, legal: Iterable[str]) -> AfterValidator:
    """A validator that answers a name outside of `legal` with the nearest ones and the whole list."""

    def check(value: str) -> str:
        if value not in legal:
            raise unknown_name(kind, value, legal)
        return value

    return AfterValidator(check)


def checked_chain(argument: str, members: str, chain: str) -> str:
    """A chain without empty links."""
    if not all(chain.split("+")):
        raise BarberError(f"{argument} {chain!r} is not legal: {members} joined by '+', or 'none'")
    return chain


def parts_of(chain: str) -> list[str]:
    """The links of a chain; none for 'none'."""
    return [] if chain == "none" else chain.split("+")


def one_line(error: ValidationError) -> BarberError:
    """All faults of a configuration in one line."""
    faults = []
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        path = [str(part) for part in fault["loc"]]
        if len(path) > 1 and path[0] in NAMELESS:
            path = path[1:]
        where = ".".join(path)
        own = isinstance(fault.get("ctx", {}).get("error"), BarberError)
        faults.append(message if own else f"{where} {fault['input']!r} is not legal: {message}")
    return BarberError("; ".join(dict.fromkeys(faults)))
