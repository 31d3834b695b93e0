"""Optimal exchanges in the rows of each Linear, by Gram matrices (SparseSwaps, arXiv 2512.10922)."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from ...tensors.swaps import exchange
from ..quadratic import Quadratic, in_order, quadratics
from ..rebuild_settings import RebuildConfig
from ..trial import Masks, Trial
from .base import REBUILDERS, Outcome
from .foresight import begin, begins, foresee

BEFORE_NEWTON = 30  # exchanges a row within M-groups where gauss-newton follows, which would undo further ones


@REBUILDERS.register("swaps")
def swaps(trial: Trial, config: RebuildConfig) -> Outcome:
    """First all Linears but the one that closes the block, each by its own output's error; then that one.

    The closing Linear sees what the others' new masks give it and exchanges by the block error itself; where
    `gauss-newton` follows, which ends each of its rounds with it, it is left to that. Of the masks before, between and
    after, those with the lowest block error are returned (`accept: always`: the last).
    """
    first, *closing = in_order(trial)[: 1 if trial.following == "gauss-newton" else None]
    early = trial.pattern.semi_structured and trial.following == "gauss-newton"
    fewer = config.model_copy(update={"swaps": min(config.swaps, BEFORE_NEWTON) if early else config.swaps})
    steps = [trial.masks, with_exchanges(trial, trial.masks, begin("swaps", trial, config), fewer)]
    for names in closing:
        steps.append(exchanged(trial, steps[-1], names, config))
    pairs = zip(pairwise(steps), [first, *closing], strict=True)
    rounds = [{"swaps": difference(*masks), "linears": names} for masks, names in pairs]
    return outcome(trial, config, steps, rounds)


@begins("swaps")
def _first_look(trial: Trial, masks: Masks, config: RebuildConfig) -> dict[str, Quadratic]:
    return quadratics(trial, masks, in_order(trial)[0], config.shrinkage)


def outcome(trial: Trial, config: RebuildConfig, steps: list[Masks], rounds: list[dict[str, Any]]) -> Outcome:
    """Of the masks before, between and after the rounds those with the lowest error, or the last; rounds marked."""
    best = len(steps) - 1
    if config.accept != "always":
        foresee(trial, steps[-1], config)
        errors = [trial.error(masks) for masks in steps]
        best = errors.index(min(errors))
    for index, record in enumerate(rounds, start=1):
        record["accepted"] = index <= best
    return Outcome(steps[best], rounds)


def exchanged(trial: Trial, masks: Masks, names: Sequence[str], config: RebuildConfig) -> Masks:
    """The masks after as many exchanges as there may be in every row of the named Linears; E(masks) is measured."""
    return with_exchanges(trial, masks, quadratics(trial, masks, names, config.shrinkage, again=True), config)


def with_exchanges(trial: Trial, masks: Masks, models: Mapping[str, Quadratic], config: RebuildConfig) -> Masks:
    """The masks after as many exchanges as there may be in every row of the Linears, by their quadratics.

    The very ones that were given where nothing is exchanged.
    """
    group = trial.pattern.group if trial.pattern.semi_structured else None
    candidate = dict(masks)
    for name, found in models.items():
        rows = partial(_rows, trial.values(name), masks[name], found, config.swaps, group)
        candidate[name] = trial.ranks.spread(rows, masks[name])
    return candidate if difference(masks, candidate) else masks


def _rows(values: Tensor, keep: Tensor, found: Quadratic, most: int, group: int | None, rows: slice) -> Tensor:
    """The new masks of some rows."""
    return exchange(values[rows], keep[rows], found.gram, found.correlation[rows], most, group)


def difference(before: Masks, after: Masks) -> int:
    """How many weights the one keeps and the other does not."""
    return sum(int((after[name] & ~before[name]).count_nonzero()) for name in after)
