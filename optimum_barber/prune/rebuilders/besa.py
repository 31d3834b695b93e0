"""BESA (arXiv 2402.16880): how much each row of a block prunes, learned by the block error; exact in the end."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tensors.besa import (
    beta_gradient,
    bucket_of,
    candidate_rates,
    exact_counts,
    keep_of_buckets,
    row_rates,
    softmax_gradient,
    starting_logits,
)
from ...tensors.input_statistics import InputRecorder
from ...tensors.masks import rank_in_group
from ..block_cache import Masks
from ..contract import kept_weights
from ..rebuild_settings import RebuildConfig
from ..trial import Trial
from .base import REBUILDERS, Outcome, swap_count

BUCKETS = 100  # D, as published
LEARNING_RATE = 1e-2
PENALTY = 10.0  # of the squared distance from the target rate, where the error is relative to the dense output
NEEDS = frozenset({"input_norm"})


@dataclass
class Rates:
    """The learned rates of one Linear's rows: scores |W_ij| ||X_j||, their buckets, and logits of beta."""

    scores: Tensor
    bucket: Tensor
    logits: Tensor

    def beta(self) -> Tensor:
        """The coefficients of the candidate rates, (rows, D - 1)."""
        return self.logits.softmax(1)

    def keep(self) -> Tensor:
        """The keep mask at these rates, (out, in) bool."""
        return keep_of_buckets(self.beta().detach()).gather(1, self.bucket)


@REBUILDERS.register("besa")
def besa(trial: Trial, config: RebuildConfig) -> Outcome:
    """Learn the rate of every row in one pass over the samples; kept only if the block error falls (`accept`).

    Adam minimises ||Block(W, X) - Block(W * M, X)||^2 / ||Block(W, X)||^2 + penalty (mean rate - target)^2, a sample a
    step. Then all rates are shifted alike, so that the block keeps as many weights as before, and each row prunes its
    lowest scores.

    Not for N:M, where every group's count is fixed; settings refuse that.
    """
    with InputRecorder(trial.linears, NEEDS) as recorder:
        trial.watch(trial.masks)
    kept = kept_weights(trial.masks)
    size = sum(keep.numel() for keep in trial.masks.values())
    rates: dict[str, Rates] = {}
    for name, inputs in recorder.result(trial.ranks).items():
        assert inputs.input_norm is not None
        scores = trial.values(name).abs() * inputs.input_norm
        logits = starting_logits(1 - kept / size, len(scores), BUCKETS).to(scores.device)
        rates[name] = Rates(scores, bucket_of(scores, BUCKETS), logits)
    _learn(trial, rates, 1 - kept / size)
    candidate = _exact_masks(rates, size - kept)
    accepted = config.accept == "always" or trial.error(candidate) < trial.error(trial.masks)
    record: dict[str, Any] = {"swaps": swap_count(trial.masks, candidate), "accepted": accepted}
    for name, learned in rates.items():
        record[name.rpartition(".")[2]] = float(row_rates(learned.beta()).mean())
    return Outcome(candidate if accepted else trial.masks, [record])


def _learn(trial: Trial, rates: dict[str, Rates], target: float) -> None:
    """One step of Adam on the logits for each sample, in order."""
    optimizer = torch.optim.Adam([learned.logits for learned in rates.values()], lr=LEARNING_RATE)
    for sample in trial.samples():
        masks = {name: learned.keep() for name, learned in rates.items()}
        with trial.trainable(masks) as weights:
            result = next(trial.results([sample]))
            unit = result.target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
            gradients = torch.autograd.grad(result.error / unit, list(weights.values()))
        excess = _mean_rate(rates) - target
        for (name, learned), gradient in zip(rates.items(), gradients, strict=True):
            push = beta_gradient(trial.values(name) * gradient, learned.bucket, BUCKETS)
            push += 2 * PENALTY * excess * _rate_gradient(learned, rates)
            learned.logits.grad = softmax_gradient(learned.beta(), push)
        optimizer.step()
        trial.gradient_passes += 1 / len(trial.inputs)


def _mean_rate(rates: dict[str, Rates]) -> float:
    """The share of all weights that is pruned at the learned rates."""
    size = sum(learned.scores.numel() for learned in rates.values())
    pruned = sum(float(row_rates(learned.beta()).sum()) * learned.scores.shape[1] for learned in rates.values())
    return pruned / size


def _rate_gradient(learned: Rates, rates: dict[str, Rates]) -> Tensor:
    """The gradient of the mean rate by the coefficients of any row of one Linear, (D - 1,)."""
    size = sum(each.scores.numel() for each in rates.values())
    candidates = candidate_rates(BUCKETS).to(learned.logits.device)
    return candidates * (learned.scores.shape[1] / size)


def _exact_masks(rates: dict[str, Rates], pruned: int) -> Masks:
    """The masks at the learned rates, shifted so that they prune so many weights together."""
    due = torch.cat([row_rates(learned.beta()) for learned in rates.values()])
    widths = [torch.full((len(learned.scores),), learned.scores.shape[1]) for learned in rates.values()]
    counts = exact_counts(due, torch.cat(widths), pruned)
    masks: Masks = {}
    for (name, learned), count in zip(rates.items(), counts.split([len(width) for width in widths]), strict=True):
        masks[name] = rank_in_group(learned.scores) >= count[:, None].to(learned.scores.device)
    return masks
