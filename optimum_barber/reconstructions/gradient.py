"""Some steps of Adam on the block error, the masks fixed, stopped by windows that are held out."""

from typing import Any

import torch
from torch import Tensor

from ..config import ReconstructConfig
from ..trial import Trial, error_of
from . import RECONSTRUCTIONS

HELD_OUT = 8  # every eighth sample measures, the others are learned from


@RECONSTRUCTIONS.register("gradient")
def gradient(trial: Trial, config: ReconstructConfig) -> dict[str, Any]:
    """One sample a step, in order; the values with the lowest held-out error are offered, and taken if E falls.

    The held-out error is looked at after every pass over the other samples; a pass that does not lower it is the last.
    """
    samples = list(trial.samples())
    held_out = samples[::HELD_OUT]
    learned = [sample for index, sample in enumerate(samples) if index % HELD_OUT] or samples
    with trial.trainable(trial.masks) as weights:
        best, lowest, passes = _copies(weights), _mean_error(trial, held_out), 0
        optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
        for _ in range(config.passes):
            for sample in learned:
                _step(trial, weights, optimizer, sample)
            passes += 1
            error = _mean_error(trial, held_out)
            if not error < lowest:
                break
            best, lowest = _copies(weights), error
    return {"passes": passes, "accepted": trial.adopt(best)}


def _step(
    trial: Trial,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    sample: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """One step on one sample; pruned weights have no gradient and so stay exactly zero."""
    x, target, token_weights = sample
    error = error_of(trial.forward(x), target, token_weights)
    gradients = torch.autograd.grad(error, list(weights.values()))
    for (name, weight), slope in zip(weights.items(), gradients, strict=True):
        weight.grad = slope.mul_(trial.masks[name])
    optimizer.step()


@torch.no_grad()
def _mean_error(trial: Trial, samples: list[tuple[Tensor, Tensor, Tensor | None]]) -> float:
    errors = [float(error_of(trial.forward(x), target, weights)) for x, target, weights in samples]
    return sum(errors) / len(errors)


def _copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}
