"""The rounds of a refinement: gradient, one exchange in every row that gains by it, measurement."""

from collections.abc import Callable, Mapping
from math import isfinite, sqrt
from typing import Any

from torch import Tensor

from ...base.errors import BarberError
from ..block_quadratic import expand
from ..quadratic import Quadratic
from ..rebuild_settings import RebuildConfig
from ..rebuilders.gauss_newton import Pace, shortened, step
from ..rebuilders.swaps import difference, with_exchanges
from ..trial import Masks, Trial
from .settings import RefineSettings
from .whole import part_of

MEASURING = 4  # every fourth sample measures, the others are learned from
ROWS = 10  # one row in so many makes an exchange in the first step that is tried: they meet in the model's output
LEAST = 2**-16  # of a step's length
FACTOR = sqrt(2)

Told = Callable[[Mapping[str, Any]], None]


def refined(
    trial: Trial, masks: Masks, settings: RefineSettings, tell: Told = lambda record: None
) -> tuple[Masks, list[dict[str, Any]]]:
    """Better masks, and a record of each round; the very ones that were given where no round helps.

    Every round takes the divergence for quadratic around the masks, by the rows of all Linears (`block_quadratic`), on
    the samples that are learned from. In each row the pruned weight that gains most by itself is exchanged for the kept
    one that then suits it best (inside N:M groups the best pair), if that lowers the row's part; all rows at once, as
    far as the length of the step allows, which is found on the samples that measure. So no round raises their error.

    Args:
        trial: the whole model.
        masks: by Linear, (out, in) bool.
        settings: of the refinement.
        tell: called with the record of each round.

    Raises:
        BarberError: the divergence is not finite.
    """
    measuring, learned = parted(trial)
    pace = Pace(settings.exchanges, factor=FACTOR, least=LEAST, parabolic=False)
    config = RebuildConfig(method="gauss-newton", swaps=settings.exchanges, shrinkage=settings.shrinkage)
    worth: dict[str, Tensor] | None = None
    length, rounds = 0.0, list[dict[str, Any]]()
    if not isfinite(measuring.error(masks)):
        raise BarberError(f"divergence from the dense model is {measuring.error(masks)}: NaN or Inf in its weights?")
    for _ in range(settings.rounds):
        around = expand(learned, masks, list(trial.linears), settings.shrinkage, worth)
        length = length or first_length(learned, config, around.models, masks)
        candidate, length, tried = step(measuring, config, around.models, masks, length, pace)
        around.models.clear()  # their memory, before the next ones are made
        worth = around.worth
        record = {"swaps": difference(masks, candidate), "length": length, "candidates": tried}
        record |= {"learned": learned.error(masks), "before": tried[0][1], "after": min(error for _, error in tried)}
        rounds.append(record)
        tell(record)
        if candidate is masks:
            break
        masks = candidate
    return masks, rounds


def parted(trial: Trial) -> tuple[Trial, Trial]:
    """The samples that measure, and those that are learned from."""
    indices = range(len(trial.inputs))
    return part_of(trial, indices[::MEASURING]), part_of(trial, [index for index in indices if index % MEASURING])


def first_length(trial: Trial, config: RebuildConfig, models: Mapping[str, Quadratic], masks: Masks) -> float:
    """The least power of two, at most 1, of a step in which one row in `ROWS` makes an exchange."""
    enough, length = sum(len(keep) for keep in masks.values()) / ROWS, LEAST
    while length < 1 and difference(masks, with_exchanges(trial, masks, shortened(models, length), config)) < enough:
        length *= 2
    return length
