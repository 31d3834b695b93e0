"""Nested figures as one level of numbers."""

from collections.abc import Mapping
from typing import Any


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return all numbers by their path, such as `perplexity/pydoc/perplexity`, as trackers want them."""
    numbers: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + key] = value
    return numbers
