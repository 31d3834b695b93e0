"""Producers, rebuilders, patterns and settings on equal terms: one calibration set, one evaluation, one table."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runner import Comparison as Comparison
    from .runner import compare as compare

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> Any:
    """The verb is imported when first asked for: the command line reads the settings alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runner

    return getattr(runner, name)
