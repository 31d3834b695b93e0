"""The error as a quadratic function of one Linear's weights: what exchanges and least squares work on. Torch only.

For the Linear that closes its block (o, down) that is the block error itself, exactly, up to a factor: its output is
the block's, so residual and input determine the error. For the others it is the error of their own output.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..tensors.sums import Products
from .block_cache import Masks, MaskVersion, closing_inputs_fit
from .trial import SampleResult, Trial

Call = tuple[Tensor, Tensor]  # input and output of a Linear


@dataclass
class Quadratic:
    """sum over tokens of omega ||t - V x||^2 around V = v * m, for targets t and inputs x of one Linear.

    Attributes:
        gram: G = sum over tokens of omega x x^T, (in, in) float32; shared by Linears with the same input.
        correlation: C = sum over tokens of omega (t - V x) x^T, (out, in) float32; the gradient is -2 C.
    """

    gram: Tensor
    correlation: Tensor


class Shortened(Mapping[str, Quadratic]):
    """The quadratics as a step of this length sees them, each made when it is asked for."""

    def __init__(self, models: Mapping[str, Quadratic], length: float) -> None:
        self.models, self.length = models, length

    def __getitem__(self, name: str) -> Quadratic:
        model = self.models[name]
        return Quadratic(model.gram, model.correlation * self.length)

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)


@torch.no_grad()
def quadratics(
    trial: Trial,
    masks: Masks,
    names: Sequence[str],
    shrinkage: float = 0.0,
    keep_closing_inputs: bool = False,
    grams: Mapping[str, Tensor] | None = None,
) -> dict[str, Quadratic]:
    """Sum up the quadratic of each named Linear with the block under `masks`; E(masks) is measured on the way.

    The target of the closing Linear is the block's; that of any other its dense weights on the input that it gets.
    Correlations between inputs that few calibration tokens show are partly chance. With the shrinkage rho in [0, 1]

        G' = (1 - rho) G + rho diag(G),    C' = (1 - rho) C + rho (W - V) diag(G),

    as if a share rho of the tokens had uncorrelated inputs of the same size, and dense outputs as targets.

    Args:
        keep_closing_inputs: whether the masks that are measured next change the closing Linear's alone.
        grams: G' by Linear, of masks nearby, used instead of new ones; correlations are summed anew.
    """
    sums = InputSums(trial, names, shrinkage, grams)
    closing = closing_linear(trial) if keep_closing_inputs else None
    inputs: list[Tensor] = []
    if closing is None or closing not in names or not closing_inputs_fit(trial.linears, closing, trial.inputs):
        closing = None
    with calls_of(trial, names) as calls:

        def observe(result: SampleResult) -> None:
            sums.add(calls, result)
            if closing is not None:
                inputs.append(calls[closing][0])

        trial.watch(masks, observe)
    if closing is not None:
        trial.cache.closing_inputs = closing, MaskVersion(masks), inputs
    shrunk, residuals = sums.totals()
    models = {}
    for name in names:
        gram, missing = shrunk[name], trial.weight(name) - trial.weight(name, masks[name])
        if name in residuals:
            correlation = shrink_correlation(residuals[name], missing, gram, shrinkage)
        else:
            correlation = missing @ gram
        models[name] = Quadratic(gram, correlation)
    return models


def in_order(trial: Trial) -> list[list[str]]:
    """The names of Linears that are worked on together: first all but the closing one, then that one."""
    closing = closing_linear(trial)
    groups = [[name for name in trial.linears if name != closing]]
    if closing is not None:
        groups.append([closing])
    return [names for names in groups if names]


def closing_linear(trial: Trial) -> str | None:
    """The Linear whose output is the block's; None if the block does more behind all of them."""
    if trial.cache.closing is None:
        with calls_of(trial, list(trial.linears)) as calls, torch.no_grad():
            output = trial.forward(next(iter(trial.inputs)))
            trial.cache.closing = [name for name, call in calls.items() if _same(call[1], output)][:1]
    return next(iter(trial.cache.closing), None)


class InputSums:
    """Gram matrices of the inputs of Linears, and the correlation of the block's residual with the closing one's.

    Inputs that no mask of the block reaches are the same in every pass: their Gram matrices are summed in the first
    and kept in the block's cache. Shrunk ones that are passed in are not summed.
    """

    def __init__(
        self, trial: Trial, names: Sequence[str], shrinkage: float, grams: Mapping[str, Tensor] | None = None
    ) -> None:
        self.names, self.ranks, self.shrinkage, self.shrunk = names, trial.ranks, shrinkage, dict(grams or {})
        self.linears, self.place = trial.linears, trial.sums_on
        self.known = trial.cache.grams.setdefault(shrinkage, {})
        self.same_input: dict[str, str] = {}  # by Linear, the first one with its input
        self.first_inputs: dict[str, Tensor] = {}  # by Linear but the closing one, of inputs that are not known
        self.grams: dict[str, Products] = {}
        self.residuals: dict[str, Products] = {}

    def add(self, calls: Mapping[str, Call], result: SampleResult) -> None:
        """Add one sample: input and output of each Linear, and what the block gave."""
        if not self.same_input:
            self._start(calls, result.output)
        for name in self.names:
            if name not in self.grams and name not in self.residuals:
                continue
            tokens = getattr(self.linears[name], "tokens", None)  # of an expert, those that are routed to it
            x = _weighted(calls[name][0], result.token_weights, tokens)
            if name in self.grams:
                self.grams[name].add(x, x)
            if name in self.residuals:
                self.residuals[name].add(_weighted(result.target - result.output, result.token_weights), x)

    def _start(self, calls: Mapping[str, Call], output: Tensor) -> None:
        """Decide by the first sample what is summed."""
        first: dict[int, str] = {}
        for name in self.names:
            x, y = calls[name]
            self.same_input[name] = first.setdefault(id(x), name)
            closes = _same(y, output)
            if closes:
                self.residuals[name] = Products(place=self.place)
            self._check_known(name, None if closes else x)
            if self.same_input[name] == name and name not in self.known and name not in self.shrunk:
                self.grams[name] = Products(symmetric=True, place=self.place)

    def _check_known(self, name: str, x: Tensor | None) -> None:
        """Forget a known Gram matrix if on any rank its first input is another one; remember new inputs."""
        known = self.known.get(name)
        if known is not None:
            unchanged = x is not None and x.numel() > 0 and torch.equal(x, known[0])
            if not all(self.ranks.gather([float(unchanged)])):
                del self.known[name]
        if x is not None and name not in self.known:
            self.first_inputs[name] = x.detach()

    def totals(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Shrunk Gram matrices of all Linears, and residual correlations of closing ones, over all ranks; once."""
        grams = {}
        for name, products in self.grams.items():
            grams[name] = shrink_gram(products.over(self.ranks), self.shrinkage)
            if name in self.first_inputs:
                self.known[name] = self.first_inputs[name], grams[name]
        for name, (_, gram) in self.known.items():
            grams.setdefault(name, gram)
        grams |= self.shrunk
        residuals = {name: products.over(self.ranks) for name, products in self.residuals.items()}
        return {name: grams[self.same_input[name]] for name in self.names}, residuals


def _weighted(stream: Tensor, weights: Tensor | None, tokens: Tensor | None = None) -> Tensor:
    """(tokens, width), each token by the root of its weight, so that products of two carry the weight.

    `tokens` are the rows of the block's input that the stream was made of; None for all. A stream of another number of
    rows, such as one that the block has pooled, has weights of 1.
    """
    rows = stream.reshape(-1, stream.shape[-1])
    if weights is None:
        return rows
    own = weights.reshape(-1, 1) if tokens is None else weights.reshape(-1, 1)[tokens]
    return rows * own.sqrt() if len(own) == len(rows) else rows


def shrink_gram(gram: Tensor, shrinkage: float) -> Tensor:
    """G' = (1 - rho) G + rho diag(G), in place."""
    diagonal = gram.diagonal().clone()
    gram.mul_(1 - shrinkage).diagonal().copy_(diagonal)
    return gram


def shrink_correlation(correlation: Tensor, missing: Tensor, gram: Tensor, shrinkage: float) -> Tensor:
    """C' = (1 - rho) C + rho (W - V) diag(G), in place; the diagonal is the same in G and G'."""
    return correlation.mul_(1 - shrinkage).addcmul_(missing, gram.diagonal(), value=shrinkage)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@contextmanager
def calls_of(trial: Trial, names: Sequence[str]) -> Iterator[dict[str, Call]]:
    """Record input and output of the latest call of each Linear, while the context lasts."""
    calls: dict[str, Call] = {}

    def record(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name] = inputs[0], output

    with ExitStack() as stack:
        for name in names:
            handle = trial.linears[name].register_forward_hook(partial(record, name))
            stack.callback(handle.remove)
        yield calls
