"""The exceptions of the package: each is one line, and knows the exit status of a command that ends with it."""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 100  # characters of a bad value
LONGEST = 4000  # characters of a message, which may hold a stranger's names


class BarberError(ValueError):
    """Bad input: one line that names the argument, the value and what would be legal.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = 2

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[:LONGEST]}...")


class FailedCheckError(BarberError):
    """A check of a result failed: the input was good, the result is not."""

    status = 1


class UnfinishedError(BarberError):
    """A run cannot go on and can be resumed: the input was good, the machine was not enough."""

    status = 1


class LostRankError(UnfinishedError):
    """Another rank of the run has ended or is stuck; that rank itself reports what is wrong."""


class MissingExtraError(BarberError):
    """An optional dependency is absent; the message is the line that installs it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'optimum-barber[{extra}]'")


def shown(value: object) -> str:
    """Return a value as a message shows it: the beginning of its repr."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> BarberError:
    """Return the error for a name that is not known: the nearest known ones first, then all of them."""
    names = sorted(known)
    nearest = [repr(neighbour) for neighbour in get_close_matches(name, names, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return BarberError(f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}")
