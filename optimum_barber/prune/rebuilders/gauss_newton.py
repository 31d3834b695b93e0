"""Exchanges in all rows of a block at once, by what they do to the block error (Gauss-Newton)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..block_quadratic import Expansion, expand
from ..quadratic import Quadratic, in_order, quadratics
from ..rebuild_settings import RebuildConfig
from ..trial import Masks, Trial
from .base import REBUILDERS, Outcome
from .foresight import begin, begins
from .ratio import SMALLEST_RATIO, climb, stride_of
from .swaps import difference, outcome, with_exchanges

LENGTH = 1 / 16  # of the first step that is tried: 1 would suit rows whose effects never meet
EACH = 6  # exchanges a row and step: a few good ones in every row spoil each other less than many in some


@dataclass(frozen=True)
class Pace:
    """How a step is taken.

    Attributes:
        each: exchanges a row at most.
        stride: every so many samples measure the lengths that are tried.
        factor: between these lengths.
        least: of them.
        parabolic: whether errors run like a parabola over the length.
    """

    each: int = EACH
    stride: int = 1
    factor: float = 2.0
    least: float = SMALLEST_RATIO
    parabolic: bool = True


@REBUILDERS.register("gauss-newton")
def gauss_newton(trial: Trial, config: RebuildConfig) -> Outcome:
    """Rounds of: exchanges in all Linears but the closing one by the gradient of the block error, then in that one.

    How far a round goes, 1 / mu, is found by the measured error, which runs nearly like a parabola. The gradient pass
    of a round measures the masks of the round before on the way. Where no length helps it ends; in the first round the
    closing Linear has its turn even so, since `swaps` left it to this one. Later ones take its Gram matrix over and sum
    its correlation anew. Of all masks those with the lowest block error are returned (`accept: always`: the last).
    """
    inner, *closing = in_order(trial)
    steps, rounds, length = [trial.masks], list[dict[str, Any]](), LENGTH
    around: Expansion = begin("gauss-newton", trial, config)
    grams: dict[str, Tensor] = {}
    pace = Pace(stride=stride_of(trial.inputs.total))
    while True:
        candidate, length, tried = step(trial, config, around.models, steps[-1], length, pace)
        around.models.clear()  # their memory
        if rounds and candidate is steps[-1]:
            break
        for names in closing:
            models = quadratics(trial, candidate, names, config.shrinkage, again=True, grams=grams)
            candidate = with_exchanges(trial, candidate, models, config)
            grams = {name: found.gram for name, found in models.items()}
        rounds.append({"swaps": difference(steps[-1], candidate), "length": length, "candidates": tried})
        length = min(2 * length, 1.0)  # nearer to the end, rows spoil each other less
        steps.append(candidate)
        if len(rounds) == config.newton_rounds:
            break
        around = expand(trial, candidate, inner, config.shrinkage, around.worth)
        if config.accept != "always" and trial.error(candidate) >= trial.error(steps[-2]):
            break
    return outcome(trial, config, steps, rounds)


@begins("gauss-newton")
def _first_look(trial: Trial, masks: Masks, config: RebuildConfig) -> Expansion:
    return expand(trial, masks, in_order(trial)[0], config.shrinkage)


def step(
    trial: Trial, config: RebuildConfig, models: dict[str, Quadratic], masks: Masks, start: float, pace: Pace
) -> tuple[Masks, float, list[list[float]]]:
    """The masks of the best step found, its length and the errors of all lengths; the given ones where none helps."""
    stride, few = pace.stride, config.model_copy(update={"swaps": pace.each})
    errors, stepped = {0.0: trial.error_on_every(stride, masks)}, dict[float, Masks]()

    def measure(length: float) -> float:
        if length in errors:
            return errors[length]
        stepped[length] = with_exchanges(trial, masks, shortened(models, length), few)
        error = trial.error_on_every(stride, stepped[length])
        errors[length] = math.inf if math.isnan(error) else error
        best = min(stepped, key=errors.__getitem__)
        for worse in stepped.keys() - {best}:
            del stepped[worse]
        return errors[length]

    too_long = measure(start) > errors[0.0]
    factors = (1 / pace.factor,) if too_long else (pace.factor, 1 / pace.factor)
    length, error = climb(measure, start, factors, errors[0.0], pace.parabolic, pace.least)
    tried = [list(pair) for pair in sorted(errors.items())]
    return (masks, start, tried) if error is None else (stepped[length], length, tried)


def shortened(models: Mapping[str, Quadratic], length: float) -> dict[str, Quadratic]:
    """The quadratics as a step of this length sees them."""
    return {name: Quadratic(found.gram, found.correlation * length) for name, found in models.items()}
