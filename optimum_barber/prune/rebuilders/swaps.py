"""Optimal exchanges in the rows of each Linear, by Gram matrices (SparseSwaps, arXiv 2512.10922)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...tensors.swaps import exchange
from ..block_cache import Masks
from ..quadratic import Quadratic, in_order, quadratics
from ..rebuild_settings import RebuildConfig
from ..trial import Trial
from .base import REBUILDERS, Outcome, starts_with, swap_count

BEFORE_NEWTON = 30  # exchanges a row within M-groups where the next rebuilder would undo further ones


def _first_quadratics(trial: Trial, masks: Masks, config: RebuildConfig) -> dict[str, Quadratic]:
    return quadratics(trial, masks, in_order(trial)[0], config.shrinkage)


@REBUILDERS.register("swaps")
@starts_with(_first_quadratics)
def swaps(trial: Trial, config: RebuildConfig, models: dict[str, Quadratic]) -> Outcome:
    """First all Linears but the one that closes the block, each by its own output's error; then that one.

    The closing Linear sees what the others' new masks give it and exchanges by the block error itself, unless the next
    rebuilder goes on with it. Of the masks before, between and after, those with the lowest block error are returned
    (`accept: always`: the last).
    """
    inner, *closing = in_order(trial)
    most = config.swaps
    if trial.leaves_closing:
        closing = []
        if trial.pattern.semi_structured:
            most = min(most, BEFORE_NEWTON)
    steps = [trial.masks, with_exchanges(trial, trial.masks, models, most)]
    models.clear()  # frees the Gram matrices
    rounds = [{"swaps": swap_count(*steps), "linears": inner}]
    for names in closing:
        models |= quadratics(trial, steps[-1], names, config.shrinkage, keep_closing_inputs=True)
        steps.append(with_exchanges(trial, steps[-1], models, config.swaps))
        models.clear()
        rounds.append({"swaps": swap_count(*steps[-2:]), "linears": names})
    return best_outcome(trial, config, steps, rounds)


def best_outcome(trial: Trial, config: RebuildConfig, steps: list[Masks], rounds: list[dict[str, Any]]) -> Outcome:
    """The masks before, between or after the rounds with the lowest error, or the last ones; the rounds are marked."""
    best = len(steps) - 1
    if config.accept != "always":
        trial.share_last_pass(steps[-1])
        errors = [trial.error(masks) for masks in steps]
        best = errors.index(min(errors))
    for index, record in enumerate(rounds, start=1):
        record["accepted"] = index <= best
    return Outcome(steps[best], rounds)


def with_exchanges(trial: Trial, masks: Masks, models: Mapping[str, Quadratic], most: int) -> Masks:
    """The masks after at most `most` exchanges a row by these quadratics; the very dictionary if there are none."""
    group = trial.pattern.group if trial.pattern.semi_structured else None
    candidate = dict(masks)
    for name, model in models.items():
        some = partial(_exchange_rows, trial.values(name), masks[name], model, most, group)
        candidate[name] = trial.ranks.spread(some, masks[name])
    return candidate if swap_count(masks, candidate) else masks


def _exchange_rows(values: Tensor, keep: Tensor, model: Quadratic, most: int, group: int | None, rows: slice) -> Tensor:
    return exchange(values[rows], keep[rows], model.gram, model.correlation[rows], most, group)
