"""Reconstructions: functions that give the kept weights of a block new values, its masks fixed."""

from collections.abc import Callable
from typing import Any

from ...base.registry import Registry
from ..settings import ReconstructConfig
from ..trial import Trial

Reconstruction = Callable[[Trial], dict[str, Any]]
Function = Callable[[Trial, ReconstructConfig], dict[str, Any]]
RECONSTRUCTIONS: Registry[Function] = Registry("reconstruction", "optimum_barber.reconstructions")


def reconstructions_of(config: ReconstructConfig) -> list[Reconstruction]:
    """The reconstructions that a configuration names, in order, ready to take a trial."""
    return [_bound(RECONSTRUCTIONS[name], config) for name in config.chain]


def _bound(function: Function, config: ReconstructConfig) -> Reconstruction:
    return lambda trial: function(trial, config)
