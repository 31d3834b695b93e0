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
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors.derivatives import backward
from ..tensors.sums import Sum
from .quadratic import Quadratic, Sums, calls_of, shrink_correlation
from .trial import Masks, Trial

PROBED = 4  # random signs are sent back through every fourth sample
LEAST = 1e-6  # of their mean: what rows are worth at the least on which nothing depends


@dataclass
class Expansion:
    """The block error around some masks.

    Attributes:
        models: by Linear, of each row in units of h_r; mu is left to whoever takes a step.
        worth: by Linear, E ||(J^T u)_r||^2 summed over the samples, (out,).
    """

    models: dict[str, Quadratic]
    worth: dict[str, Tensor]


def expand(
    trial: Trial, masks: Masks, names: Sequence[str], shrinkage: float = 0.0, worth: dict[str, Tensor] | None = None
) -> Expansion:
    """The block error around `masks` by the rows of each named Linear; E(masks) is measured on the way.

    With the shrinkage rho, as in `quadratics`,

        G' = (1 - rho) G + rho diag(G),    C' = (1 - rho) C / h + rho (W - V) diag(G).

    Args:
        trial: the block.
        masks: that it wears.
        names: of the Linears.
        shrinkage: rho, in [0, 1].
        worth: of an expansion around masks nearby, taken over; None to send random signs back.
    """
    slopes, sums = _Slopes(trial, names, probing=worth is None), Sums(trial, names, shrinkage)
    with calls_of(trial, names) as calls:

        def see(error: Tensor, output: Tensor, weights: Tensor | None) -> None:
            slopes.add(error, output, weights)
            with torch.no_grad():
                sums.add(calls, output, output, weights)

        trial.differentiate(masks, see)
    grams, _ = sums.over()
    worth = worth or {name: total.over(trial.ranks) for name, total in slopes.worth.items()}
    found = {}
    for name, gram in grams.items():
        missing = trial.weight(name) - trial.weight(name, masks[name])
        correlation = _by_worth(slopes.correlation[name].over(trial.ranks), worth[name] / gram.diagonal().sum())
        found[name] = Quadratic(gram, shrink_correlation(correlation, missing, gram, shrinkage))
    return Expansion(found, worth)


def _by_worth(correlation: Tensor, worth: Tensor) -> Tensor:
    """C / h of one Linear, in the memory of C."""
    worth = worth.clamp(min=LEAST * float(worth.mean())).clamp(min=torch.finfo(worth.dtype).tiny)
    return correlation.div_(worth[:, None])


class _Slopes:
    """Sums over samples by Linear: C = J^T R, and of ||(J^T u)_r||^2, what row r is worth, by those that are probed."""

    def __init__(self, trial: Trial, names: Sequence[str], probing: bool) -> None:
        self.probing, self.judge, total = probing, trial.judge, trial.inputs.total
        self.share = len(range(0, total, PROBED)) / total
        self.leaves = {name: trial.linears[name].weight for name in names}
        self.correlation = {name: Sum() for name in names}
        self.worth = {name: Sum() for name in names if probing}
        for name, worth in self.worth.items():  # a rank may have no sample that is probed
            worth.add(torch.zeros_like(self.leaves[name][:, 0]))
        self.sample = trial.inputs.share.first if trial.inputs.share else 0

    def add(self, error: Tensor, output: Tensor, weights: Tensor | None) -> None:
        """Add the next sample: its error, its output, the weights of its tokens."""
        probed = self.probing and self.sample % PROBED == 0
        scale = -self.judge.units(output) / 2
        backward(error, self.leaves, lambda name, g: self.correlation[name].add(g.mul_(scale)), again=probed)
        if probed:
            backward(output, self.leaves, self._weigh, self.judge.probe(output, weights, self.sample))
        self.sample += 1

    def _weigh(self, name: str, gradient: Tensor) -> None:
        self.worth[name].add(gradient.square_().sum(1).div_(self.share))
