"""The block error as a quadratic function of every inner Linear's weights (Gauss-Newton). Torch only.

Let R = Y - Block(V, X) be the residual at the weights V = W * M, and J the Jacobian of the block's output by the
weights of one Linear. To a change D of these, the error summed over tokens and channels answers, to second order, with

    -2 <D, C> + ||J D||^2,    C = J^T R,

of which C is exact: through the activation, the attention and all Linears behind. ||J D||^2 is what a row's change does
to its own output, times what that output is worth at the block's:

    ||J D||^2 ~ mu sum_r h_r D_r G D_r^T,    h_r = E ||(J^T u)_r||^2 / tr G,

for random signs u, G = sum of x x^T the Gram matrix of the Linear's inputs. Rows that work on the same outputs meet
there; the damping mu stands for that, and whoever takes a step finds it by the measured error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .quadratic import Quadratic, Sums, calls_of, distinct, shrink
from .trial import Masks, Trial

PROBED = 4  # random signs are sent back through every fourth sample
LEAST = 1e-6  # of their mean: what rows are worth at the least on which nothing depends


def block_quadratics(trial: Trial, masks: Masks, names: Sequence[str], shrinkage: float = 0.0) -> dict[str, Quadratic]:
    """The block error around `masks` by the rows of each named Linear; E(masks) is measured on the way.

    Row r is in units of h_r, and mu is left to the caller. With the shrinkage rho, as in `quadratics`,

        G' = (1 - rho) G + rho diag(G),    C' = (1 - rho) C / h + rho (W - V) diag(G).

    Args:
        trial: the block.
        masks: that it wears.
        names: of the Linears.
        shrinkage: rho, in [0, 1].
    """
    slopes, sums = _Slopes(trial, names), Sums(names)
    with calls_of(trial, names) as calls:

        def see(error: Tensor, output: Tensor, weights: Tensor | None) -> None:
            slopes.add(error, output, weights)
            with torch.no_grad():
                sums.add(calls, output, output, weights)

        trial.differentiate(masks, see)
    for tensor in distinct([*sums.gram.values(), *slopes.correlations, *slopes.worths]):
        trial.ranks.sum(tensor)
    for gram in distinct(sums.gram.values()):
        shrink(gram, shrinkage)
    return {
        name: Quadratic(sums.gram[name], _by_worth(trial, masks, name, sums.gram[name], found, shrinkage))
        for name, found in zip(names, zip(slopes.correlations, slopes.worths, strict=True), strict=True)
    }


class _Slopes:
    """C = J^T R and sum of ||(J^T u)_r||^2 over the probed samples, for each of some Linears."""

    def __init__(self, trial: Trial, names: Sequence[str]) -> None:
        self.weights = [trial.linears[name].weight for name in names]
        self.correlations = [torch.zeros_like(weight) for weight in self.weights]
        self.worths = [torch.zeros_like(weight[:, 0]) for weight in self.weights]
        self.sample = trial.inputs.share.first if trial.inputs.share else 0

    def add(self, error: Tensor, output: Tensor, weights: Tensor | None) -> None:
        """Add the next sample."""
        probed = self.sample % PROBED == 0
        for correlation, gradient in zip(self.correlations, self._back(error, None, probed), strict=True):
            correlation.sub_(gradient, alpha=output.numel() / 2)
        if probed:
            signs = _signs(output, self.sample)
            signs = signs if weights is None else (signs * weights.sqrt()).view_as(output)
            for worth, gradient in zip(self.worths, self._back(output, signs, False), strict=True):
                worth.add_(gradient.square_().sum(1))
        self.sample += 1

    def _back(self, output: Tensor, given: Tensor | None, again: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.weights, given, retain_graph=again)


def _signs(like: Tensor, seed: int) -> Tensor:
    """1 or -1 at random, drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)


def _by_worth(
    trial: Trial, masks: Masks, name: str, gram: Tensor, found: tuple[Tensor, Tensor], shrinkage: float
) -> Tensor:
    """C' of one Linear, whose Gram matrix has been shrunk."""
    (correlation, worth), diagonal = found, gram.diagonal()
    worth = worth * trial.inputs.total / len(range(0, trial.inputs.total, PROBED)) / diagonal.sum()
    worth = worth.clamp(min=float(worth.mean()) * LEAST).clamp(min=torch.finfo(worth.dtype).tiny)
    missing = trial.weight(name) - trial.weight(name, masks[name])
    return correlation.div_(worth[:, None]).mul_(1 - shrinkage).addcmul_(missing, diagonal, value=shrinkage)
