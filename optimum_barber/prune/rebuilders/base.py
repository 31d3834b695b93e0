"""Rebuilders: functions that take a block on trial and give it better masks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

from ...base.registry import Registry
from ...tensors.masks import count_all
from ..block_cache import Masks, SharedPass
from ..rebuild_settings import RebuildConfig
from ..trial import Trial


@dataclass
class Outcome:
    """What a rebuilder did to one block.

    Attributes:
        masks: the keep masks it settled on; the very dictionary it was given if it changed nothing.
        rounds: one record a round: pairs, ratio, swaps, whether it was accepted.
    """

    masks: Masks
    rounds: list[dict[str, Any]] = field(default_factory=list)


RebuildFunction = Callable[[Trial, RebuildConfig], Outcome]
Rebuilder = Callable[[Trial], Outcome]
Measure = Callable[[Trial, Masks, RebuildConfig], Any]
REBUILDERS: Registry[RebuildFunction] = Registry("rebuilder", "optimum_barber.rebuilders")


class StatisticsRebuilder:
    """A rebuilder that starts with a pass of its own; in a chain, the rebuilder before it may make that pass.

    The function takes the trial, the settings and the statistics that `measure` sums in that pass, with E on the way;
    `takes_closing` if it goes on with exchanges in rows, those of the closing Linear among them.
    """

    def __init__(self, function: Callable[..., Outcome], measure: Measure, takes_closing: bool = False) -> None:
        update_wrapper(self, function)
        self.function, self.measure, self.takes_closing = function, measure, takes_closing

    def __call__(self, trial: Trial, config: RebuildConfig) -> Outcome:
        """Rebuild with the statistics of the shared pass, if there was one at these masks, or of a pass made now."""
        statistics = trial.cache.take_shared(SharedPass(self.measure, config), trial.masks)
        if statistics is None:
            statistics = self.measure(trial, trial.masks, config)
        return self.function(trial, config, statistics)


def starts_with(measure: Measure, takes_closing: bool = False) -> Callable[[Callable[..., Outcome]], RebuildFunction]:
    """Declare the pass that a rebuilder starts with; the decorated function takes its result as third argument."""
    return lambda function: StatisticsRebuilder(function, measure, takes_closing)


def chain_of(config: RebuildConfig) -> list[Rebuilder]:
    """The rebuilders that a configuration names, in order, ready to take a trial."""
    functions = [REBUILDERS[name] for name in config.chain]
    return [_bound(*pair, config) for pair in zip(functions, [*functions[1:], None], strict=False)]


def _bound(function: RebuildFunction, following: RebuildFunction | None, config: RebuildConfig) -> Rebuilder:
    """The rebuilder with its settings, which first tells the trial what the next one starts with."""

    def bound(trial: Trial) -> Outcome:
        trial.shared_pass, trial.leaves_closing = None, False
        if isinstance(following, StatisticsRebuilder):
            trial.leaves_closing = following.takes_closing
            if config.accept != "always":  # nobody asks for the error of the last masks
                trial.shared_pass = SharedPass(following.measure, config)
        return function(trial, config)

    return bound


def swap_count(before: Masks, after: Masks) -> int:
    """The number of weights that `after` keeps and `before` does not."""
    return count_all(after[name] & ~before[name] for name in after)
