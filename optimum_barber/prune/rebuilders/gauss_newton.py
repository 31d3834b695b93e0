"""Exchanges in all rows of a block at once, by what they do to the block error (Gauss-Newton)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..block_cache import Masks
from ..block_quadratic import Expansion, expand
from ..quadratic import Quadratic, Shortened, in_order, quadratics
from ..rebuild_settings import RebuildConfig
from ..trial import Trial
from .base import REBUILDERS, Outcome, starts_with, swap_count
from .ratio import SMALLEST_RATIO, by_ratio, climb, stride_of
from .swaps import best_outcome, with_exchanges

LENGTH = 1 / 16  # of the first step that is tried: 1 would suit rows whose effects never meet
EACH = 6  # exchanges a row and step: a few good ones in every row spoil each other less than many in some


def _first_expansion(trial: Trial, masks: Masks, config: RebuildConfig) -> Expansion:
    return expand(trial, masks, in_order(trial)[0], config.shrinkage)


@REBUILDERS.register("gauss-newton")
@starts_with(_first_expansion, takes_closing=True)
def gauss_newton(trial: Trial, config: RebuildConfig, expansion: Expansion) -> Outcome:
    """Rounds of: exchanges in all Linears but the closing one by the gradient of the block error, then in that one.

    How far a round goes, 1 / mu, is found by the measured error, which runs nearly like a parabola. The gradient pass
    of a round measures the masks of the round before on the way. Where no length helps it ends; in the first round the
    closing Linear has its turn even so, since `swaps` may leave it to this one. Later rounds use its first Gram matrix
    again and sum its correlation anew. Of all masks those with the lowest block error are returned (`accept: always`:
    the last).
    """
    inner, *closing = in_order(trial)
    steps: list[Masks] = [trial.masks]
    rounds: list[dict[str, Any]] = []
    length, closing_grams = LENGTH, dict[str, Tensor]()
    stride = stride_of(trial.inputs.total)
    while len(rounds) < config.newton_rounds:
        if rounds:
            expansion = expand(trial, steps[-1], inner, config.shrinkage, expansion.worth)
            if config.accept != "always" and trial.error(steps[-1]) >= trial.error(steps[-2]):
                break
        step = best_step(trial, expansion.models, steps[-1], length, EACH, stride)
        expansion.models.clear()  # frees the Gram matrices
        if rounds and step.masks is steps[-1]:
            break
        candidate = step.masks
        for names in closing:
            models = quadratics(trial, candidate, names, config.shrinkage, True, closing_grams)
            candidate = with_exchanges(trial, candidate, models, config.swaps)
            closing_grams = {name: model.gram for name, model in models.items()}
        swaps = swap_count(steps[-1], candidate)
        rounds.append({"swaps": swaps, "length": step.length, "candidates": by_ratio(step.errors)})
        length = min(2 * step.length, 1.0)  # nearer to the end, rows spoil each other less
        steps.append(candidate)
    return best_outcome(trial, config, steps, rounds)


class Step(NamedTuple):
    """Masks after a step (the very dictionary before it where no length helps), its length, errors by length tried."""

    masks: Masks
    length: float
    errors: dict[float, float]


def best_step(
    trial: Trial,
    models: Mapping[str, Quadratic],
    masks: Masks,
    start: float,
    exchanges: int,
    stride: int = 1,
    factor: float = 2.0,
    shortest: float = SMALLEST_RATIO,
    parabolic: bool = True,
) -> Step:
    """The best step from `masks`; lengths are tried from `start` on, first shorter ones if that is too long.

    Lengths lie a `factor` apart, `shortest` is the least, and every `stride`-th sample measures them. `parabolic` if
    errors run like a parabola over the length. A row makes so many `exchanges` at most.
    """
    standing = trial.error_on_every(stride, masks)
    errors = {0.0: standing}
    best: Step | None = None

    def measure(length: float) -> float:
        nonlocal best
        if length not in errors:
            candidate = with_exchanges(trial, masks, Shortened(models, length), exchanges)
            error = trial.error_on_every(stride, candidate)
            errors[length] = math.inf if math.isnan(error) else error
            if best is None or errors[length] < errors[best.length]:
                best = Step(candidate, length, errors)
        return errors[length]

    too_long = measure(start) > standing
    factors = (1 / factor,) if too_long else (factor, 1 / factor)
    _, error = climb(measure, start, factors, standing, parabolic, shortest)
    if error is None or best is None:
        return Step(masks, start, errors)
    return best
