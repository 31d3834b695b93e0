"""The rounds of a refinement: gradient, one exchange in every row that gains by it, measurement."""

from collections.abc import Callable, Mapping
from math import isfinite, sqrt
from typing import Any

from torch import Tensor

from ...base.errors import BarberError
from ..block_cache import Masks
from ..block_quadratic import expand
from ..quadratic import Quadratic
from ..rebuilders.base import swap_count
from ..rebuilders.gauss_newton import best_step, shortened
from ..rebuilders.ratio import by_ratio
from ..rebuilders.swaps import with_exchanges
from ..trial import Trial
from .settings import RefineSettings
from .whole import part_of

MEASURING = 4  # every fourth sample measures, the others are learned from
ROWS = 10  # one row in so many makes an exchange in the first step that is tried: they meet in the model's output
LEAST = 2**-16  # of a step's length
FACTOR = sqrt(2)


def refined(
    trial: Trial,
    masks: Masks,
    settings: RefineSettings,
    report: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> tuple[Masks, list[dict[str, Any]]]:
    """Better masks, and a record of each round; the very ones that were given where no round helps.

    Every round takes the divergence for quadratic around the masks, by the rows of all Linears (`block_quadratic`), on
    the samples that are learned from. In each row the pruned weight that gains most by itself is exchanged for the kept
    one that then suits it best (inside N:M groups the best pair), if that lowers the row's part; all rows at once, as
    far as the length of the step allows, which is found on the samples that measure. So no round raises their error.

    `trial` is the whole model; `report` is called with the record of each round.

    Raises:
        BarberError: the divergence is not finite.
    """
    indices = range(trial.inputs.total)
    measuring = part_of(trial, indices[::MEASURING])
    learned = part_of(trial, [index for index in indices if index % MEASURING])
    worth: dict[str, Tensor] | None = None
    length, rounds = 0.0, list[dict[str, Any]]()
    if not isfinite(measuring.error(masks)):
        raise BarberError(f"divergence from the dense model is {measuring.error(masks)}: NaN or Inf in its weights?")
    for _ in range(settings.rounds):
        expansion = expand(learned, masks, list(trial.linears), settings.shrinkage, worth)
        models, worth = expansion.models, expansion.worth
        if not rounds:
            length = _first_length(learned, models, masks, settings.exchanges)
        step = best_step(measuring, models, masks, length, settings.exchanges, 1, FACTOR, LEAST, parabolic=False)
        models.clear()  # frees the Gram matrices before the next ones are made
        length = step.length
        record = {"swaps": swap_count(masks, step.masks), "length": length, "candidates": by_ratio(step.errors)}
        record |= {"learned": learned.error(masks), "before": step.errors[0.0], "after": min(step.errors.values())}
        rounds.append(record)
        report(record)
        if step.masks is masks:
            break
        masks = step.masks
    return masks, rounds


def _first_length(trial: Trial, models: Mapping[str, Quadratic], masks: Masks, exchanges: int) -> float:
    """The least power of two, at most 1, of a step in which one row in `ROWS` makes an exchange."""
    enough = sum(len(keep) for keep in masks.values()) / ROWS
    length = LEAST
    while length < 1:
        stepped = with_exchanges(trial, masks, shortened(models, length), exchanges)
        if swap_count(masks, stepped) >= enough:
            break
        length *= 2
    return length
