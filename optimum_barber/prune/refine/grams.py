"""Gram matrices of what enters the Linears of a whole model, summed while it runs, so that no input is kept."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...base.errors import BarberError
from ...tensors.sums import Products
from ..block_cache import Masks
from ..quadratic import shrink_gram
from ..trial import Trial


class SameInputs:
    """Which Linears are called with the same tensor, such as q, k and v."""

    def __init__(self) -> None:
        self._callers = WeakTensorKeyDictionary()  # by tensor, the Linear that was first called with it as it is now
        self._calls: dict[str, Counter[str]] = {}  # by Linear, how often it got the input of which caller

    def note(self, name: str, x: Tensor) -> bool:
        """Note a call; whether it is the first one with this tensor."""
        caller, writes = self._callers.get(x, (name, None))
        if writes != x._version:
            caller = name
            self._callers[x] = name, x._version
        self._calls.setdefault(name, Counter())[caller] += 1
        return bool(caller == name)

    def first(self) -> dict[str, str]:
        """By Linear, the first one with its input; itself for most.

        Raises:
            BarberError: a Linear shares the inputs of some calls alone, so that neither has a Gram matrix.
        """
        first: dict[str, str] = {}
        for name, calls in self._calls.items():
            caller, *others = calls
            if others or calls != self._calls[caller]:
                raise BarberError(f"{name} shares its input with {caller} in some calls only: not supported")
            first[name] = caller
        return first


@contextmanager
def inputs_shown(linears: Mapping[str, nn.Linear], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Inside, show `see` the name and the input of each Linear when it is called."""

    def show(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(name, inputs[0])

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(partial(show, name)).remove)
        yield


@torch.no_grad()
def gram_matrices(trial: Trial, masks: Masks, shrinkage: float) -> dict[str, Tensor]:
    """G' = (1 - rho) G + rho diag(G) of each Linear under the masks, (in, in) float32; E(masks) is measured on the way.

    G = sum over tokens of x x^T, of all calls of a Linear that runs several times. Linears with the same input share
    one matrix. They wait where the trial's sums do.
    """
    same = SameInputs()
    sums = {name: Products(symmetric=True, place=trial.sums_on) for name in trial.linears}

    def add(name: str, x: Tensor) -> None:
        if same.note(name, x):
            rows = x.reshape(-1, x.shape[-1])
            sums[name].add(rows, rows)

    with inputs_shown(trial.linears, add):
        trial.watch(masks)
    grams: dict[str, Tensor] = {}
    first = same.first()
    for name in trial.linears:
        if first[name] == name:
            grams[name] = shrink_gram(sums.pop(name).over(trial.ranks), shrinkage)
    return {name: grams[first[name]] for name in trial.linears}
