"""Statistics of the inputs of Linears, summed sample by sample, only those that are needed. Torch only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..base.ranks import ALONE, Ranks
from .sums import Products, Sum

CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {  # of one sample, (tokens, in)
    "input_norm": lambda x: x.square().sum(0),
    "input_abs": lambda x: torch.linalg.vector_norm(x, 1, 0),
    "input_sum": lambda x: x.sum(0),
}
STATISTICS = ("input_norm", "gram", "input_abs", "input_sum")


@dataclass
class InputStatistics:
    """Statistics of one Linear's input X, (tokens, in), over the whole calibration set; None unless needed.

    Without a token, as for an expert to which none is routed, they are those of inputs of norm 1 that do not correlate:
    scores that they weigh become magnitudes.

    Attributes:
        input_norm: ||X_j||_2 of each channel j, (in,) float32.
        gram: H = sum over tokens of x x^T, (in, in) float32.
        input_abs: sum over tokens of |X_tj| of each channel j, (in,) float32.
        input_sum: sum over tokens of X_tj of each channel j, (in,) float32.
    """

    input_norm: Tensor | None = None
    gram: Tensor | None = None
    tokens: int = 0
    input_abs: Tensor | None = None
    input_sum: Tensor | None = None


class _InputSums:
    def __init__(self, needs: frozenset[str]) -> None:
        self.channels = {name: Sum() for name in CHANNELS if name in needs}
        self.gram = Products(symmetric=True) if "gram" in needs else None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        for name, total in self.channels.items():
            total.add(CHANNELS[name](x))
        if self.gram is not None:
            self.gram.add(x, x)

    def over(self, ranks: Ranks, weight: Tensor) -> InputStatistics:
        """The sums over all ranks for Linears of this width, the norm out of its squares."""
        tokens = int(sum(ranks.gather([self.tokens])))
        if not tokens:
            return self._without_tokens(weight.shape[1], weight.device)
        statistics = InputStatistics(tokens=tokens)
        for name, total in self.channels.items():
            setattr(statistics, name, total.over(ranks))
        if statistics.input_norm is not None:
            statistics.input_norm.sqrt_()
        if self.gram is not None:
            statistics.gram = self.gram.over(ranks)
        return statistics

    def _without_tokens(self, width: int, device: torch.device) -> InputStatistics:
        statistics = InputStatistics(gram=torch.eye(width, device=device) if self.gram is not None else None)
        for name in self.channels:
            value = 0.0 if name == "input_sum" else 1.0
            setattr(statistics, name, torch.full((width,), value, device=device))
        return statistics


class InputRecorder:
    """Sums input statistics of Linears while a block runs; Linears that share an input share the work.

    Use as a context manager around the forward passes, one sample a pass.
    """

    def __init__(self, linears: dict[str, nn.Linear], needs: frozenset[str]) -> None:
        self.linears, self.needs = linears, needs
        self._sums = {name: _InputSums(needs) for name in linears}
        self._last: tuple[Tensor, _InputSums] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "InputRecorder":
        if self.needs:
            for name, linear in self.linears.items():
                self._handles.append(linear.register_forward_pre_hook(partial(self._add, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _add(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if self._last is not None and self._last[0] is x:
            self._sums[name] = self._last[1]
        else:
            self._sums[name].add(x.detach().reshape(-1, x.shape[-1]))
            self._last = (x, self._sums[name])

    def result(self, ranks: Ranks = ALONE) -> dict[str, InputStatistics]:
        """The statistics by Linear over all ranks, to be asked for once; one input, the same tensors."""
        totals: dict[_InputSums, InputStatistics] = {}
        for name, sums in self._sums.items():
            if sums not in totals:
                totals[sums] = sums.over(ranks, self.linears[name].weight)
        return {name: replace(totals[sums]) for name, sums in self._sums.items()}
