"""Rebuilders: functions that take a block on trial and give it better masks."""

from . import barber, besa, dsnot, gauss_newton, swaps  # noqa: F401  registered on import
from .base import REBUILDERS, Outcome, Rebuilder, chain_of, starts_with

__all__ = ["REBUILDERS", "Outcome", "Rebuilder", "chain_of", "starts_with"]
