"""Some steps of Adam on the block error, the masks fixed, stopped by windows that are held out."""

from typing import Any

import torch
from torch import Tensor

from ..settings import ReconstructConfig
from ..trial import Trial
from .base import RECONSTRUCTIONS

HELD_OUT = 8  # every eighth sample measures, the others are learned from


@RECONSTRUCTIONS.register("gradient")
def gradient(trial: Trial, config: ReconstructConfig) -> dict[str, Any]:
    """One sample a step, in order; the values with the lowest held-out error are offered, and taken if E falls.

    The held-out error is looked at after every pass over the other samples; a pass that does not lower it is the last.
    Errors are taken in units of the first held-out error, so that the step does not depend on their scale.
    """
    with trial.trainable(trial.masks) as weights:
        best, lowest, passes = _copies(weights), _held_out_error(trial), 0
        unit = lowest or 1.0
        optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
        while passes < config.passes:
            _pass(trial, weights, optimizer, unit)
            passes += 1
            error = _held_out_error(trial)
            if not error < lowest:
                break
            best, lowest = _copies(weights), error
    return {"passes": passes, "accepted": trial.adopt(best)}


def _pass(trial: Trial, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, unit: float) -> None:
    """One step on each sample that is not held out; pruned weights have no gradient and so stay exactly zero."""
    for index, sample in enumerate(trial.samples()):
        if index % HELD_OUT == 0 and len(trial.inputs) > 1:
            continue
        result = next(trial.results([sample]))
        gradients = torch.autograd.grad(result.error / unit, list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            weight.grad = gradient.mul_(trial.masks[name])
        optimizer.step()
        trial.gradient_passes += 1 / len(trial.inputs)


@torch.no_grad()
def _held_out_error(trial: Trial) -> float:
    errors = [float(result.error) for result in trial.results(trial.samples(stride=HELD_OUT))]
    trial.forward_passes += len(errors) / len(trial.inputs)
    return sum(errors) / len(errors)


def _copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}
