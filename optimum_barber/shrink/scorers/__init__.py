"""Scorers: functions that rank the heads or the FFN channels of a decoder layer; the highest stay."""

from . import barber, baselines, bip, propagation, taylor  # noqa: F401  registered on import
from .base import SCORERS, ModelInput, Scorer, ScorerFunction, UnitInput, as_scorer, scorer

__all__ = ["SCORERS", "ModelInput", "Scorer", "ScorerFunction", "UnitInput", "as_scorer", "scorer"]
