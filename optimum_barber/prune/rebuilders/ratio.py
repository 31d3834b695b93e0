"""The mask rebuilding ratio alpha: given, or found by the measured error of a few candidates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ...tensors.exchange import Ranking
from ..rebuild_settings import RebuildConfig
from ..trial import Masks, Trial

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
    trial: Trial, config: RebuildConfig, ranking: Ranking, masks: Masks, before: float | None
) -> Proposal | None:
    """The exchange at the configured ratio, or at the best one found; None where nothing is swapped."""
    ratio = config.rebuild_ratio
    measured: dict[float, float] = {}
    if ratio == "auto":
        found = _search(trial, ranking, masks, before, measured)
        if found is None:
            return None
        ratio = found
    candidate = masks_at(trial, ranking, ratio)
    swaps = sum(int((candidate[name] & ~masks[name]).count_nonzero()) for name in masks)
    return Proposal(candidate, ratio, swaps, measured) if swaps else None


def masks_at(trial: Trial, ranking: Ranking, ratio: float) -> Masks:
    """The masks by Linear that the ranking gives at a ratio."""
    return dict(zip(trial.linears, ranking.at(ratio), strict=True))


def _search(
    trial: Trial, ranking: Ranking, masks: Masks, before: float | None, measured: dict[float, float]
) -> float | None:
    """The best ratio found; None where no candidate is better than the masks as they stand.

    What was measured on the way goes into `measured`.

    The first round climbs from the share of outliers among the pair values, up first; later ones from the
    ratio before, down only, since the ratio falls from round to round.
    """
    stride = stride_of(trial.inputs.total)
    factors = (STEP, 1 / STEP) if before is None else (1 / STEP,)

    def measure(ratio: float) -> float:
        measured[ratio] = trial.error_on_every(stride, masks_at(trial, ranking, ratio))
        return measured[ratio]

    measured[0.0] = trial.error_on_every(stride, masks)
    start = before or min(max(ranking.outlier_share(), SMALLEST_RATIO), LARGEST_RATIO)
    ratio, error = climb(measure, start, factors, measured[0.0])
    return ratio if error is not None else None


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
            lowest = errors[best]
            if parabolic and lowest < standing and _foretold(errors, ratio, standing) >= lowest:
                break
            error = errors[ratio] = measure(ratio)
            if error < lowest:
                best = ratio
            elif lowest < standing or (error == standing) == (factor < 1):
                break  # an error that stands still means no swap: going further down is vain, going up is not
            ratio *= factor
        if best != start and errors[best] < standing:
            break
    return best, errors[best] if errors[best] < standing else None


def _foretold(errors: dict[float, float], ratio: float, standing: float) -> float:
    """The error by the parabola through `standing` at 0 and the two measured ratios next to this one; -inf by one."""
    if len(errors) == 1:
        return -math.inf
    one, other = sorted(errors, key=lambda measured: abs(math.log(measured / ratio)))[:2]
    slope, further = ((errors[measured] - standing) / measured for measured in (one, other))
    return standing + ratio * (slope + (further - slope) / (other - one) * (ratio - one))
