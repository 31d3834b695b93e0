"""The error as a quadratic function of one Linear's weights: what exchanges and least squares work on. Torch only.

For the Linear that closes its block (o, down) that is the block error itself, exactly, up to a factor: its output is
the block's, so residual and input say everything. For the others it is the error of their own output.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .gram import add_gram, mirror
from .ranks import Ranks
from .trial import Masks, Trial

CLOSING = "closing Linear"  # a note on a trial


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
def quadratics(trial: Trial, masks: Masks, names: Sequence[str], shrinkage: float = 0.0) -> dict[str, Quadratic]:
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
    """
    sums = Sums(names)
    with calls_of(trial, names) as calls:
        trial.watch(masks, lambda output, target, weights: sums.add(calls, output, target, weights))
    sums.complete(trial.ranks, shrinkage)
    return {name: Quadratic(sums.gram[name], _correlation(trial, masks, name, sums, shrinkage)) for name in names}


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


class Sums:
    """Gram matrices and correlations, summed sample by sample."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.gram: dict[str, Tensor] = {}
        self.correlation: dict[str, Tensor] = {}

    def add(
        self, calls: dict[str, tuple[Tensor, Tensor]], output: Tensor, target: Tensor, weights: Tensor | None
    ) -> None:
        """Add what the Linears were called with and gave for one sample."""
        shared: dict[int, str] = {}
        for name in self.names:
            given, made = calls[name]
            x = _weighed(given, weights)
            first = shared.setdefault(id(given), name)
            self.gram[name] = self.gram[first] if first != name else add_gram(self.gram.get(name), x)
            if _same(made, output):
                residual = _weighed(target - output, weights)
                total = self.correlation.get(name)
                self.correlation[name] = residual.t() @ x if total is None else total.addmm_(residual.t(), x)

    def complete(self, ranks: Ranks, shrinkage: float) -> None:
        """Over all ranks, the Gram matrices with both halves and shrunk; once, behind the last sample."""
        for tensor in _distinct([*self.gram.values(), *self.correlation.values()]):
            ranks.sum(tensor)
        for gram in _distinct(self.gram.values()):
            shrink(mirror(gram), shrinkage)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that several Linears share once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _weighed(stream: Tensor, weights: Tensor | None) -> Tensor:
    """(tokens, width), each token by the root of its weight, so that products of two carry the weight."""
    rows = stream.reshape(-1, stream.shape[-1])
    return rows if weights is None else rows * weights.reshape(-1, 1).sqrt()


def shrink(gram: Tensor, shrinkage: float) -> None:
    """G' = (1 - rho) G + rho diag(G), in place."""
    diagonal = gram.diagonal().clone()
    gram.mul_(1 - shrinkage).diagonal().copy_(diagonal)


def _correlation(trial: Trial, masks: Masks, name: str, sums: Sums, shrinkage: float) -> Tensor:
    gram, missing = sums.gram[name], trial.weight(name) - trial.weight(name, masks[name])
    if name not in sums.correlation:
        return missing @ gram
    return shrink_correlation(sums.correlation[name], missing, gram, shrinkage)


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
