"""Objectives: the error of an output under masks beside the dense one. Torch only.

Rebuilders that look at a small change D of the weights take the error summed over tokens for quadratic around them: by
its slope and by random vectors u whose outer products are, on average, the Gauss-Newton part of half of its second
derivative by the output.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Objective(Protocol):
    """The error E of the outputs of one sample, (1, tokens, channels), against targets."""

    def error(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """E of one sample, a scalar that can be differentiated; `weights` of the tokens are (1, tokens, 1)."""

    def units(self, output: Tensor) -> float:
        """The factor from E of one sample to the sum whose second derivative `probe` samples."""

    def probe(self, output: Tensor, weights: Tensor | None, seed: int) -> Tensor:
        """A random vector u of the output's shape, the same for the same seed on every device."""


class SquaredError:
    """mean(omega (output - target)^2): what LLM-Barber measures a block by."""

    def error(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Average over channels, then tokens: a sum over all would depend on the number of threads."""
        errors = functional.mse_loss(output, target, reduction="none").mean(-1, keepdim=True)
        return (errors if weights is None else errors * weights).mean()

    def units(self, output: Tensor) -> float:
        """Sums are over tokens and channels."""
        return output.numel()

    def probe(self, output: Tensor, weights: Tensor | None, seed: int) -> Tensor:
        """Random signs, by the root of the tokens' weights."""
        signs = random_signs(output, seed)
        return signs if weights is None else (signs * weights.sqrt()).view_as(output)


SQUARED_ERROR = SquaredError()


def random_signs(like: Tensor, seed: int) -> Tensor:
    """1 or -1 at random, drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)
