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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .quadratic import Quadratic, Sums, calls_of, distinct, shrink, shrink_correlation
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
    for tensor in distinct([*sums.gram.values(), *slopes.correlation.values(), *slopes.worth.values()]):
        trial.ranks.sum(tensor)
    for gram in distinct(sums.gram.values()):
        shrink(gram, shrinkage)
    found = {}
    for name, gram in sums.gram.items():
        missing = trial.weight(name) - trial.weight(name, masks[name])
        found[name] = Quadratic(gram, shrink_correlation(slopes.by_worth(name, gram), missing, gram, shrinkage))
    return found


class _Slopes:
    """Sums over samples by Linear: C = J^T R, and over the probed ones ||(J^T u)_r||^2, what row r is worth."""

    def __init__(self, trial: Trial, names: Sequence[str]) -> None:
        self.inputs = trial.inputs
        self.leaves = {name: trial.linears[name].weight for name in names}
        self.correlation = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        self.worth = {name: torch.zeros_like(leaf[:, 0]) for name, leaf in self.leaves.items()}
        self.sample = trial.inputs.share.first if trial.inputs.share else 0

    def add(self, error: Tensor, output: Tensor, weights: Tensor | None) -> None:
        """Add the next sample: its error, its output, the weights of its tokens."""
        probed = self.sample % PROBED == 0
        for name, gradient in self._back(error, None, again=probed):
            self.correlation[name].sub_(gradient, alpha=output.numel() / 2)
        if probed:
            signs = _signs(output, self.sample)
            signs = signs if weights is None else (signs * weights.sqrt()).view_as(output)
            for name, gradient in self._back(output, signs, again=False):
                self.worth[name].add_(gradient.square_().sum(1))
        self.sample += 1

    def _back(self, output: Tensor, given: Tensor | None, again: bool) -> Iterator[tuple[str, Tensor]]:
        gradients = torch.autograd.grad(output, list(self.leaves.values()), given, retain_graph=again)
        return zip(self.leaves, gradients, strict=True)

    def by_worth(self, name: str, gram: Tensor) -> Tensor:
        """C / h of one Linear, in the memory of C; `gram` has the trace of all samples."""
        share = len(range(0, self.inputs.total, PROBED)) / self.inputs.total
        worth = self.worth[name] / (share * gram.diagonal().sum())
        worth = worth.clamp(min=LEAST * float(worth.mean())).clamp(min=torch.finfo(worth.dtype).tiny)
        return self.correlation[name].div_(worth[:, None])


def _signs(like: Tensor, seed: int) -> Tensor:
    """1 or -1 at random, drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)
