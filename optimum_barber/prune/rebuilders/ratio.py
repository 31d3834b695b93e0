"""The mask rebuilding ratio alpha: configured, or found by the measured error of a few candidates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ...tensors.exchange import Ranking
from ..block_cache import Masks
from ..rebuild_settings import RebuildConfig
from ..trial import Trial
from .base import swap_count

STEP = 2.0
SMALLEST_RATIO = 0.001
LARGEST_RATIO = 1.0
SHARE = 8  # candidates are measured on every eighth sample; the winner, by whoever accepts it, on all


@dataclass
class Proposal:
    """Candidate masks, the ratio they were made with, and how many weights were swapped.

    Attributes:
        candidates: of a search, the error of every ratio that was measured, on the samples it was measured on; the
            ratio 0 is the masks as they stand.
    """

    masks: Masks
    ratio: float
    swaps: int
    candidates: dict[float, float] = field(default_factory=dict)


def propose(
    trial: Trial, config: RebuildConfig, ranking: Ranking, masks: Masks, ratio_before: float | None
) -> Proposal | None:
    """The exchange at the configured ratio, or at the best one found; None where nothing is swapped.

    The search of the first round climbs from the share of outliers among the pair values, up first; later ones from
    the ratio before, down only, since the ratio falls from round to round.
    """
    ratio = config.rebuild_ratio
    errors: dict[float, float] = {}
    if ratio == "auto":
        stride = stride_of(trial.inputs.total)

        def measure(ratio: float) -> float:
            errors[ratio] = trial.error_on_every(stride, masks_at(trial, ranking, ratio))
            return errors[ratio]

        errors[0.0] = trial.error_on_every(stride, masks)
        if ratio_before is None:
            start = min(max(ranking.outlier_share(), SMALLEST_RATIO), LARGEST_RATIO)
            ratio, error = climb(measure, start, (STEP, 1 / STEP), errors[0.0])
        else:
            ratio, error = climb(measure, ratio_before, (1 / STEP,), errors[0.0])
        if error is None:
            return None
    candidate = masks_at(trial, ranking, ratio)
    swaps = swap_count(masks, candidate)
    return Proposal(candidate, ratio, swaps, errors) if swaps else None


def masks_at(trial: Trial, ranking: Ranking, ratio: float) -> Masks:
    """The masks by Linear that the ranking gives at a ratio."""
    return dict(zip(trial.linears, ranking.at(ratio), strict=True))


def stride_of(samples: int) -> int:
    """How far apart the samples are on which candidates are measured: at most SHARE, for two samples at the least."""
    return max(min(SHARE, samples // 2), 1)


def climb(
    measure: Callable[[float], float],
    start: float,
    factors: tuple[float, ...],
    standing: float,
    parabolic: bool = False,
    least: float = SMALLEST_RATIO,
) -> tuple[float, float | None]:
    """Walk from `start` by one factor while the measured error falls; by the other if the first never helped.

    While nothing beats `standing`, the error without any swap, the walk down goes on; and so does the walk up
    over ratios that are too small to swap anything; neither goes below `least`. Where errors are `parabolic`, once
    something beats `standing`, a ratio is not measured that has no lower one by the parabola through `standing` and
    the two nearest ratios.

    Returns:
        The best ratio and its error, None where none beats `standing`.
    """
    best, errors = start, {start: measure(start)}
    for factor in factors:
        ratio = start * factor
        while least <= ratio <= LARGEST_RATIO:
            if parabolic and _is_hopeless(errors, ratio, standing):
                break
            lowest = errors[best]
            error = errors[ratio] = measure(ratio)
            if error < lowest:
                best = ratio
            elif _is_vain(factor, error, lowest, standing):
                break
            ratio *= factor
        if errors[best] < standing and best != start:
            break
    return best, errors[best] if errors[best] < standing else None


def _is_vain(factor: float, error: float, lowest: float, standing: float) -> bool:
    """True if going on cannot help: past the lowest error, down from a ratio without swaps, up from swaps that harm."""
    swaps_nothing = error == standing
    return lowest < standing or swaps_nothing == (factor < 1)


def _is_hopeless(errors: dict[float, float], ratio: float, standing: float) -> bool:
    """True if a ratio beats `standing` and this one, by the parabola through it and two measured ratios, does worse."""
    lowest = min(errors.values())
    if lowest >= standing or len(errors) == 1:
        return False
    one, other = sorted(errors, key=lambda measured: abs(math.log(measured / ratio)))[:2]
    slope = (errors[one] - standing) / one
    further = (errors[other] - standing) / other
    return standing + ratio * (slope + (further - slope) / (other - one) * (ratio - one)) >= lowest
