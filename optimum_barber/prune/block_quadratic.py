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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors.derivatives import backward
from ..tensors.sums import Sum
from .block_cache import Masks
from .quadratic import InputSums, Quadratic, calls_of, shrink_correlation
from .trial import SampleResult, Trial

PROBED = 4  # random signs are sent back through every fourth sample
LEAST_WORTH = 1e-6  # of the mean over rows: the worth of a row on which nothing depends


@dataclass
class Expansion:
    """The block error as a quadratic function of the rows of several Linears.

    Attributes:
        models: by Linear, of each row in units of h_r; mu is left to whoever takes a step.
        worth: by Linear, E ||(J^T u)_r||^2 summed over the samples, (out,).
    """

    models: dict[str, Quadratic]
    worth: dict[str, Tensor]


def expand(
    trial: Trial,
    masks: Masks,
    names: Sequence[str],
    shrinkage: float = 0.0,
    worth: dict[str, Tensor] | None = None,
    grams: Mapping[str, Tensor] | None = None,
) -> Expansion:
    """Expand the block error around `masks` by the rows of each named Linear; E(masks) is measured on the way.

    With the shrinkage rho, as in `quadratics`,

        G' = (1 - rho) G + rho diag(G),    C' = (1 - rho) C / h + rho (W - V) diag(G).

    Args:
        worth: that of an expansion around masks nearby; without, random signs are sent back.
        grams: G' by Linear, already summed up; without, inputs and outputs of all the Linears are held for a sample.
    """
    slopes = _Slopes(trial, names, probing=worth is None)
    if grams is None:
        grams = _differentiated(trial, masks, names, shrinkage, slopes)
    else:
        trial.differentiate(masks, slopes.add)
    if not worth:
        worth = {name: total.over(trial.ranks) for name, total in slopes.worth.items()}
    models = {}
    for name, gram in grams.items():
        correlation = slopes.total(name).div_(row_worth(worth[name], gram)[:, None])
        missing = (trial.weight(name) - trial.weight(name, masks[name])).to(gram.device)
        models[name] = Quadratic(gram, shrink_correlation(correlation, missing, gram, shrinkage))
    return Expansion(models, worth)


def _differentiated(
    trial: Trial, masks: Masks, names: Sequence[str], shrinkage: float, slopes: "_Slopes"
) -> dict[str, Tensor]:
    """Sum up the slopes, and G' of each Linear in the same pass."""
    sums = InputSums(trial, names, shrinkage)
    with calls_of(trial, names) as calls:

        def observe(result: SampleResult) -> None:
            slopes.add(result)
            with torch.no_grad():
                sums.add(calls, result)

        trial.differentiate(masks, observe)
    grams, _ = sums.totals()
    return grams


def row_worth(worth: Tensor, gram: Tensor) -> Tensor:
    """h of each row, (out,) and positive, from its worth over the samples of the Gram matrix.

    It is infinite where nothing is known of any row (an expert that no probed sample reaches): the gradient then counts
    for nothing, and what shrinkage leaves is each weight on its own.
    """
    by_row = worth / gram.diagonal().sum()
    mean = float(by_row.mean())
    if not mean > 0:  # NaN too, of an expert without tokens
        return torch.full_like(by_row, torch.inf)
    return by_row.clamp_(min=LEAST_WORTH * mean).clamp_(min=torch.finfo(by_row.dtype).tiny)


class _Slopes:
    """Sum up over samples C = J^T R of each Linear and, over those that are probed, ||(J^T u)_r||^2 of each row r."""

    def __init__(self, trial: Trial, names: Sequence[str], probing: bool) -> None:
        self.probing, self.objective, self.ranks = probing, trial.objective, trial.ranks
        self.share = len(range(0, trial.inputs.total, PROBED)) / trial.inputs.total
        self.leaves = {name: trial.linears[name].weight for name in names}
        self.correlation = {name: Sum(trial.sums_on) for name in names}
        self.worth = {name: Sum(trial.sums_on) for name in names if probing}
        for name, worth in self.worth.items():  # a rank may have no sample that is probed
            worth.add(torch.zeros_like(self.leaves[name][:, 0]))
        self.sample = trial.inputs.share.first if trial.inputs.share else 0

    def add(self, result: SampleResult) -> None:
        """Add the next sample."""
        probed = self.probing and self.sample % PROBED == 0
        scale = -self.objective.units(result.output) / 2

        def add_correlation(name: str, gradient: Tensor) -> None:
            self.correlation[name].add(gradient.mul_(scale))

        backward(result.error, self.leaves, add_correlation, again=probed)
        if probed:
            signs = self.objective.probe(result.output, result.token_weights, self.sample)
            backward(result.output, self.leaves, self._add_worth, signs)
        self.sample += 1

    def total(self, name: str) -> Tensor:
        """C of one Linear over the samples of all ranks, (out, in); to be asked for once."""
        return self.correlation[name].or_zeros(self.leaves[name].detach()).over(self.ranks)

    def _add_worth(self, name: str, gradient: Tensor) -> None:
        self.worth[name].add(gradient.square_().sum(1).div_(self.share))
