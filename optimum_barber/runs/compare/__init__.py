"""Producers, rebuilders, patterns and settings on equal terms: one calibration set, one evaluation, one table."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the verb when it is first asked for: the command line reads the settings alone."""
    if name not in ("Comparison", "compare"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runner

    return getattr(runner, name)
