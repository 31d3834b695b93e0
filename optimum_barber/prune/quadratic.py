"""The error as a quadratic function of one Linear's weights: what exchanges and least squares work on. Torch only.

For the Linear that closes its block (o, down) that is the block error itself, exactly, up to a factor: its output is
the block's, so residual and input say everything. For the others it is the error of their own output.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..tensors.sums import Products
from .closing import Behind, may_be_kept
from .trial import Masks, Trial

CLOSING, GRAMS = "closing Linear", "Gram matrices"  # notes on a trial


@dataclass
class Quadratic:
    """sum over tokens of omega ||t - V x||^2 around V = v * m, for targets t and inputs x of one Linear.

    Attributes:
        gram: G = sum over tokens of omega x x^T, (in, in) float32; shared by Linears with the same input.
        correlation: C = sum over tokens of omega (t - V x) x^T, (out, in) float32; the gradient is -2 C.
    """

    gram: Tensor
    correlation: Tensor


@torch.no_grad()
def quadratics(
    trial: Trial,
    masks: Masks,
    names: Sequence[str],
    shrinkage: float = 0.0,
    again: bool = False,
    grams: Mapping[str, Tensor] | None = None,
) -> dict[str, Quadratic]:
    """The quadratic of each named Linear while the block wears `masks`; E(masks) is measured on the way.

    The target of the closing Linear is the block's; that of any other its dense weights on the input that it gets.
    Correlations between inputs that few calibration tokens show are partly chance. With the shrinkage rho

        G' = (1 - rho) G + rho diag(G),    C' = (1 - rho) C + rho (W - V) diag(G),

    as if a share rho of the tokens had uncorrelated inputs of the same size, and dense outputs as targets.

    Args:
        trial: the block.
        masks: that it wears.
        names: of the Linears.
        shrinkage: rho, in [0, 1].
        again: whether masks will be measured that differ by the closing Linear's alone, which is one of those named.
        grams: G' by Linear, of masks nearby, taken over; correlations are summed anew.
    """
    sums, behind = Sums(trial, names, shrinkage, grams), _behind(trial, masks, names) if again else None
    with calls_of(trial, names) as calls:

        def see(output: Tensor, target: Tensor, weights: Tensor | None) -> None:
            sums.add(calls, output, target, weights)
            if behind is not None:
                behind.inputs.append(calls[behind.name][0])

        trial.watch(masks, see)
    trial.behind = behind
    shrunk, correlations = sums.over()
    return {name: _around(trial, masks, name, shrunk[name], correlations.get(name), shrinkage) for name in names}


def _around(
    trial: Trial, masks: Masks, name: str, gram: Tensor, correlation: Tensor | None, shrinkage: float
) -> Quadratic:
    """One Linear's quadratic; a correlation, of the residual with its input, is that of the closing one."""
    missing = trial.weight(name) - trial.weight(name, masks[name])
    if correlation is None:
        return Quadratic(gram, missing @ gram)
    return Quadratic(gram, shrink_correlation(correlation, missing, gram, shrinkage))


def _behind(trial: Trial, masks: Masks, names: Sequence[str]) -> Behind | None:
    """Where what the closing Linear is given under the masks is kept; None where that is not among those named."""
    closing = closing_linear(trial)
    if closing is None or closing not in names or not may_be_kept(trial.linears, closing, trial.inputs):
        return None
    return Behind(closing, masks)


def in_order(trial: Trial) -> list[list[str]]:
    """The names of Linears that are worked on together: first all but the closing one, then that one."""
    closing = closing_linear(trial)
    others = [name for name in trial.linears if name != closing]
    return [names for names in (others, [closing] if closing else []) if names]


def closing_linear(trial: Trial) -> str | None:
    """The Linear whose output is the block's; None where something lies behind all of them."""
    if CLOSING not in trial.notes:
        trial.notes[CLOSING] = _closing_linear(trial)
    found: str | None = trial.notes[CLOSING]
    return found


def _closing_linear(trial: Trial) -> str | None:
    with calls_of(trial, list(trial.linears)) as calls, torch.no_grad():
        output = trial.forward(next(iter(trial.inputs)))
        return next((name for name, (_, made) in calls.items() if _same(made, output)), None)


@dataclass
class _Known:
    """A shrunk Gram matrix, and what its Linear was given for this rank's first sample."""

    first: Tensor
    gram: Tensor


class Sums:
    """Gram matrices of the inputs of Linears, and the correlation of the block's residual with the closing one's.

    Inputs that no mask of the block reaches are the same in every pass: their Gram matrices are summed in the first.

    Args:
        trial: the block, whose notes keep those.
        names: of the Linears.
        shrinkage: of the Gram matrices, in [0, 1].
        given: Gram matrices that need not be summed.
    """

    def __init__(
        self, trial: Trial, names: Sequence[str], shrinkage: float, given: Mapping[str, Tensor] | None = None
    ) -> None:
        self.names, self.ranks, self.shrinkage, self.given = names, trial.ranks, shrinkage, given or {}
        self.known: dict[str, _Known] = trial.notes.setdefault(f"{GRAMS} {shrinkage}", {})
        self.input_of: dict[str, str] = {}  # the first Linear with the same input
        self.first: dict[str, Tensor] = {}  # what those are given first, the closing one left out
        self.grams: dict[str, Products] = {}
        self.correlations: dict[str, Products] = {}

    def add(
        self, calls: dict[str, tuple[Tensor, Tensor]], output: Tensor, target: Tensor, weights: Tensor | None
    ) -> None:
        """Add what the Linears were called with and gave for one sample."""
        if not self.input_of:
            self._begin({name: calls[name][0] for name in self.names if not _same(calls[name][1], output)})
        first: dict[int, str] = {}
        for name in self.names:
            given, made = calls[name]
            self.input_of[name] = first.setdefault(id(given), name)
            summed = self.input_of[name] == name and name not in self.known and name not in self.given
            closing = _same(made, output)
            x = _weighed(given, weights) if summed or closing else given
            if summed:
                self.grams.setdefault(name, Products(symmetric=True)).add(x, x)
            if closing:
                self.correlations.setdefault(name, Products()).add(_weighed(target - output, weights), x)

    def _begin(self, given: dict[str, Tensor]) -> None:
        """Forget the Gram matrices of inputs, the closing Linear's aside, that are not what they were on every rank."""
        for name in [name for name in self.names if name in self.known]:
            alike = name in given and torch.equal(given[name], self.known[name].first)
            if not all(self.ranks.gather([float(alike)])):
                del self.known[name]
        self.first = {name: x.detach() for name, x in given.items() if name not in self.known}

    def over(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Shrunk Gram matrices of all Linears, and correlations, over all ranks; once, behind the last sample."""
        grams = {name: shrink(total.over(self.ranks), self.shrinkage) for name, total in self.grams.items()}
        self.known.update({name: _Known(self.first[name], grams[name]) for name in grams if name in self.first})
        grams = {name: known.gram for name, known in self.known.items()} | grams | dict(self.given)
        correlations = {name: total.over(self.ranks) for name, total in self.correlations.items()}
        return {name: grams[self.input_of[name]] for name in self.names}, correlations


def _weighed(stream: Tensor, weights: Tensor | None) -> Tensor:
    """(tokens, width), each token by the root of its weight, so that products of two carry the weight."""
    rows = stream.reshape(-1, stream.shape[-1])
    return rows if weights is None else rows * weights.reshape(-1, 1).sqrt()


def shrink(gram: Tensor, shrinkage: float) -> Tensor:
    """G' = (1 - rho) G + rho diag(G), in place."""
    diagonal = gram.diagonal().clone()
    gram.mul_(1 - shrinkage).diagonal().copy_(diagonal)
    return gram


def shrink_correlation(correlation: Tensor, missing: Tensor, gram: Tensor, shrinkage: float) -> Tensor:
    """C' = (1 - rho) C + rho (W - V) diag(G), in place; the diagonal is the same in G and G'."""
    return correlation.mul_(1 - shrinkage).addcmul_(missing, gram.diagonal(), value=shrinkage)


def _same(made: Tensor, output: Tensor) -> bool:
    return made.data_ptr() == output.data_ptr() and made.numel() == output.numel()


@contextmanager
def calls_of(trial: Trial, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of the latest call of each Linear, while the context lasts."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = (args[0], output)

        return hook

    with ExitStack() as stack:
        for name in names:
            handle = trial.linears[name].register_forward_hook(remember(name))
            stack.callback(handle.remove)
        yield calls
