"""Rebuilders: functions that take a block on trial and give it better masks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config import RebuildConfig
from ..registry import Registry
from ..trial import Masks, Trial


@dataclass
class Outcome:
    """What a rebuilder did to one block.

    Attributes:
        masks: the keep masks it settled on; the very dictionary it was given if it changed nothing.
        rounds: one record a round: pairs, ratio, swaps, whether it was accepted.
    """

    masks: Masks
    rounds: list[dict[str, Any]] = field(default_factory=list)


Rebuilder = Callable[[Trial], Outcome]
REBUILDERS: Registry[Callable[[Trial, RebuildConfig], Outcome]] = Registry("rebuilder", "optimum_barber.rebuilders")


def chain_of(config: RebuildConfig) -> list[Rebuilder]:
    """The rebuilders that a configuration names, ready to take a trial."""
    return [_bound(REBUILDERS[name], config) for name in config.chain]


def _bound(function: Callable[[Trial, RebuildConfig], Outcome], config: RebuildConfig) -> Rebuilder:
    return lambda trial: function(trial, config)


from . import barber, dsnot, gauss_newton, swaps  # noqa: E402,F401
