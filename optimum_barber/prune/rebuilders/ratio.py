"""The mask rebuilding ratio alpha: configured, or found by the measured error of a few candidates."""

import math
from collections.abc import Callable

from ...tensors.exchange import Ranking
from ..block_cache import Masks
from ..rebuild_settings import RebuildConfig
from ..trial import Trial

STEP = 2.0
SMALLEST_RATIO = 0.001
LARGEST_RATIO = 1.0
SHARE = 8  # candidates are measured on every eighth sample; the winner, by whoever accepts it, on all


def choose_ratio(
    trial: Trial, config: RebuildConfig, ranking: Ranking, masks: Masks, ratio_before: float | None
) -> tuple[float | None, dict[float, float]]:
    """The configured ratio, or the best one found, None where none helps; with the errors of those that were measured.

    The search of the first round climbs from the share of outliers among the pair values, up first; later ones from
    the ratio before, down only, since the ratio falls from round to round. The ratio 0 is the masks as they stand.
    """
    if config.rebuild_ratio != "auto":
        return config.rebuild_ratio, {}
    stride = stride_of(trial.inputs.total)
    standing = trial.error_on_every(stride, masks)
    errors = {0.0: standing}

    def measure(ratio: float) -> float:
        errors[ratio] = trial.error_on_every(stride, masks_at(trial, ranking, ratio))
        return errors[ratio]

    factors: tuple[float, ...] = (1 / STEP,)
    if ratio_before is None:
        ratio_before = min(max(ranking.outlier_share(), SMALLEST_RATIO), LARGEST_RATIO)
        factors = (STEP, 1 / STEP)
    ratio, error = climb(measure, ratio_before, factors, standing)
    return ratio if error is not None else None, errors


def masks_at(trial: Trial, ranking: Ranking, ratio: float) -> Masks:
    """The masks by Linear that the ranking gives at a ratio."""
    return dict(zip(trial.linears, ranking.at(ratio), strict=True))


def by_ratio(errors: dict[float, float]) -> list[list[float]]:
    """Ratios (or lengths) and errors as a record has them, in ascending order."""
    return [list(pair) for pair in sorted(errors.items())]


def stride_of(samples: int) -> int:
    """Every how many samples candidates are measured: at most SHARE, so that two samples are left."""
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
    the two nearest ratios. Returns the best ratio and its error, None where none beats `standing`.
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
