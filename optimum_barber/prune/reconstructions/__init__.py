"""Reconstructions: functions that give the kept weights of a block new values, its masks fixed."""

from . import gradient, least_squares  # noqa: F401  registered on import
from .base import RECONSTRUCTIONS, Reconstruction, reconstructions_of

__all__ = ["RECONSTRUCTIONS", "Reconstruction", "reconstructions_of"]
