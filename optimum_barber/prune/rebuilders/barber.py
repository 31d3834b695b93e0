"""LLM-Barber (arXiv 2408.10631): rounds of gradient, exchange, measurement and acceptance."""

import logging
from typing import Any

from torch import Tensor

from ...tensors.exchange import Exchange, GroupExchange, Ranking, RowExchange, pair_value_histogram
from ...tensors.scores import finite, importance
from ..block_cache import Masks
from ..rebuild_settings import RebuildConfig
from ..trial import Trial
from .base import REBUILDERS, Outcome, swap_count
from .ratio import LARGEST_RATIO, by_ratio, choose_ratio, masks_at

logger = logging.getLogger(__name__)


@REBUILDERS.register("barber")
def barber(trial: Trial, config: RebuildConfig) -> Outcome:
    """Rebuild the block's masks: rounds of gradient, importance, exchange, acceptance.

    The gradient pass of a round measures the candidate of the round before on the way, so a round costs
    that pass and the candidates of the ratio.
    """
    rounds: list[dict[str, Any]] = []
    accepted = candidate = trial.masks
    for _ in range(config.rounds):
        gradients = trial.gradients(candidate, config.expansion, config.reduction)
        if rounds and not _accepts(trial, config, candidate, accepted, rounds):
            return Outcome(accepted, rounds)
        accepted = candidate
        proposed = _propose(trial, config, accepted, gradients, rounds)
        if proposed is None:
            return Outcome(accepted, rounds)
        candidate = proposed
    trial.share_last_pass(candidate)
    return Outcome(candidate if _accepts(trial, config, candidate, accepted, rounds) else accepted, rounds)


def _accepts(
    trial: Trial, config: RebuildConfig, candidate: Masks, accepted: Masks, rounds: list[dict[str, Any]]
) -> bool:
    """Whether the candidate of the last round replaces the masks before it (Algorithm 1, lines 12-13)."""
    rounds[-1]["accepted"] = config.accept == "always" or trial.error(candidate) < trial.error(accepted)
    return bool(rounds[-1]["accepted"])


def _propose(
    trial: Trial, config: RebuildConfig, masks: Masks, gradients: dict[str, Tensor], rounds: list[dict[str, Any]]
) -> Masks | None:
    """One round's candidate, recorded; None where nothing is worth a swap."""
    if not finite(list(gradients.values())):
        logger.warning("barber: a gradient is not finite; the masks stay as they are")
        return None
    ranking = _rank(trial, config, masks, gradients)
    ratio, errors = choose_ratio(trial, config, ranking, masks, rounds[-1]["ratio"] if rounds else None)
    if ratio is None:
        return None
    candidate = masks_at(trial, ranking, ratio)
    swaps = swap_count(masks, candidate)
    if not swaps:
        return None
    rounds.append({
        "pairs": ranking.pairs, "ratio": ratio, "swaps": swaps,
        "candidates": by_ratio(errors),
        "values": pair_value_histogram(ranking.worthwhile(), swaps),
    })  # fmt: skip
    return candidate


def _rank(trial: Trial, config: RebuildConfig, masks: Masks, gradients: dict[str, Tensor]) -> Ranking:
    """Rank the block's swaps; the gradients are used up, so that their memory is free meanwhile."""
    scores, keep = [], []
    for name in trial.linears:
        scores.append(importance(trial.weight(name), gradients.pop(name), config.metric))
        keep.append(masks[name])
    largest = LARGEST_RATIO if config.rebuild_ratio == "auto" else config.rebuild_ratio
    granularity = config.granularity_for(trial.pattern)
    if not trial.pattern.semi_structured:
        return Exchange(scores, keep, granularity, largest)
    if config.pairing == "row":
        return RowExchange(scores, keep, trial.pattern.group, largest)
    return GroupExchange(scores, keep, trial.pattern.group, granularity, largest)
