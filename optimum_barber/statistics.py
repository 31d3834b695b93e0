"""Statistics of the inputs of Linears, summed sample by sample, only those that somebody asked for. Torch only."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .gram import add_gram, mirror
from .ranks import ALONE, Ranks

STATISTICS = ("input_norm", "gram", "input_abs", "input_sum")


@dataclass
class InputStatistics:
    """What is known of one Linear's input X, (tokens, in), over the whole calibration set.

    Attributes:
        input_norm: ||X_j||_2 of each channel j, (in,) float32; None unless asked for.
        gram: H = sum over tokens of x x^T, (in, in) float32; None unless asked for.
        input_abs: sum over tokens of |X_tj| of each channel j, (in,) float32; None unless asked for.
        input_sum: sum over tokens of X_tj of each channel j, (in,) float32; None unless asked for.
        tokens: how many tokens were seen.
    """

    input_norm: Tensor | None = None
    gram: Tensor | None = None
    tokens: int = 0
    input_abs: Tensor | None = None
    input_sum: Tensor | None = None


class InputRecorder:
    """Sums input statistics of Linears while a block runs; Linears that share an input share the work.

    Use as a context manager around the forward passes, one sample a pass.
    """

    def __init__(self, linears: dict[str, nn.Linear], needs: frozenset[str]) -> None:
        self.linears, self.needs = linears, needs
        self._sums: dict[str, InputStatistics] = {name: InputStatistics() for name in linears}
        self._last: tuple[Tensor, InputStatistics] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "InputRecorder":
        for name, linear in self.linears.items() if self.needs else ():
            self._handles.append(linear.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._last is not None and self._last[0] is args[0]:
                self._sums[name] = self._last[1]
            else:
                self._add(self._sums[name], args[0])
                self._last = (args[0], self._sums[name])

        return add

    def _add(self, sums: InputStatistics, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        sums.tokens += x.shape[0]
        if "input_norm" in self.needs:
            squares = x.square().sum(0)
            sums.input_norm = squares if sums.input_norm is None else sums.input_norm.add_(squares)
        if "gram" in self.needs:
            sums.gram = add_gram(sums.gram, x)
        if "input_abs" in self.needs:
            magnitudes = torch.linalg.vector_norm(x, 1, 0)
            sums.input_abs = magnitudes if sums.input_abs is None else sums.input_abs.add_(magnitudes)
        if "input_sum" in self.needs:
            totals = x.sum(0)
            sums.input_sum = totals if sums.input_sum is None else sums.input_sum.add_(totals)

    def result(self, ranks: Ranks = ALONE) -> dict[str, InputStatistics]:
        """The statistics by Linear over all ranks, to be asked for once if there are several.

        Linears with the same input hold the same tensors.
        """
        totals = {key: _total(sums, ranks) for key, sums in {id(s): s for s in self._sums.values()}.items()}
        return {n: replace(totals[id(s)]) for n, s in self._sums.items()}


def _total(sums: InputStatistics, ranks: Ranks) -> InputStatistics:
    """The sums over all ranks, the norm out of its squares."""
    found = {name: None if (part := getattr(sums, name)) is None else ranks.sum(part) for name in STATISTICS}
    if found["gram"] is not None:
        mirror(found["gram"])
    squares = found.pop("input_norm")
    norm = None if squares is None else squares.sqrt()
    return InputStatistics(norm, tokens=int(sum(ranks.gather([sums.tokens]))), **found)
