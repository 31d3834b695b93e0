"""Rebuilders: functions that take a block on trial and give it better masks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...base.registry import Registry
from ..rebuild_settings import RebuildConfig
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
    """The rebuilders that a configuration names, ready to take a trial, each told which one follows."""
    links = zip(config.chain, [*config.chain[1:], None], strict=False)
    return [_bound(REBUILDERS[name], config, following) for name, following in links]


def _bound(
    function: Callable[[Trial, RebuildConfig], Outcome], config: RebuildConfig, following: str | None
) -> Rebuilder:
    def bound(trial: Trial) -> Outcome:
        trial.following = following
        return function(trial, config)

    return bound
