"""OWL, outlier weighed layerwise sparsity (arXiv 2310.05175): layers with more outliers are pruned less."""

from itertools import groupby
from operator import itemgetter

from torch import Tensor

from ...base.errors import BarberError
from ...tensors.budget import Shares
from ..trial import Trial
from .base import Budget, allocation


@allocation("owl")
def owl(budget: Budget, *, outlier: float = 5.0, spread: float = 0.08) -> Shares:
    """Shares by decoder layer, from D_l, the share of a layer's scores |W_ij| ||X_j|| above `outlier` times their mean.

    With d_l = (D_l - min D) / (max D - min D), layer l has the sparsity s_l = target - 2 spread (d_l - mean d), where
    the mean counts prunable weights: the layers differ by up to 2 spread, and the average is the target.
    """
    budget.check_spread("owl", spread)
    if not outlier > 0:
        raise BarberError(f"outlier {outlier:g} of allocation 'owl' is not legal: a number above 0")
    outliers: dict[str, float] = {}
    weights: dict[str, int] = {}
    layer_of: dict[str, str] = {}
    for layer, trials in groupby(budget.trials(["input_norm"]), key=itemgetter(0)):
        scores: list[Tensor] = []
        for _, block, trial in trials:
            layer_of[block] = layer
            weights[layer] = weights.get(layer, 0) + budget.weights[block]
            scores += _wanda_scores(trial)
        outliers[layer] = _outlier_share(scores, outlier)
    sparsity = _spread_out(outliers, weights, budget.target, spread)
    return Shares({block: sparsity[layer] for block, layer in layer_of.items()}, {"outliers": outliers})


def _wanda_scores(trial: Trial) -> list[Tensor]:
    scores = []
    for name, statistics in trial.statistics.items():
        if statistics.input_norm is not None:
            scores.append(trial.weight(name).abs() * statistics.input_norm)
    return scores


def _outlier_share(scores: list[Tensor], outlier: float) -> float:
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / count
    above = 0
    for score in scores:
        above += int((score > outlier * mean).count_nonzero())
    return above / count


def _spread_out(outliers: dict[str, float], weights: dict[str, int], target: float, spread: float) -> dict[str, float]:
    low, high = min(outliers.values()), max(outliers.values())
    place = dict.fromkeys(outliers, 0.0)
    if high > low:
        place = {layer: (share - low) / (high - low) for layer, share in outliers.items()}
    mean = sum(place[layer] * count for layer, count in weights.items()) / sum(weights.values())
    return {layer: target - 2 * spread * (place[layer] - mean) for layer in outliers}
