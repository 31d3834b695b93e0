"""One block on trial: its dense weights, its keep masks, and the error that the masks cause."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..base.memory import WORTH_TRIMMING, heap
from ..base.ranks import ALONE, Ranks
from ..models.activations import Activations
from ..tensors.bits import kept_or_zero
from ..tensors.derivatives import backward, differentiable
from ..tensors.input_statistics import InputStatistics
from ..tensors.objectives import SQUARED_ERROR, Judge
from ..tensors.patterns import SparsityPattern
from ..tensors.scores import GradientReduction
from .closing import Behind

Masks = dict[str, Tensor]
logger = logging.getLogger(__name__)


@dataclass
class _Measured:
    masks: Masks
    errors: list[float]
    outputs: Activations


@dataclass
class Trial:
    """What a rebuilder sees of a block: propose masks, ask for their error and gradients.

    E(M) = mean(omega (Block(W * M, X) - Y)^2) over samples, tokens and channels; Y = Block(W, X) is the dense
    output on the sparse stream X, omega a weight for every token, 1 unless told otherwise. Every sample is computed on
    its own and sums run in the order of the samples. Errors are remembered by the mask dictionaries that were asked
    about, which must not be changed afterwards.

    Several ranks hold a share of the samples each. Errors and gradients are over the samples of all, the same on every
    rank, and what is measured anywhere are the first rank's masks: so all decide alike.

    Attributes:
        forward: the block, from one sample's input to its output.
        linears: the Linears by name; outside of this class's methods their weights are dense W, (out, in).
        inputs: X, one tensor a sample.
        targets: Y, one tensor a sample.
        token_weights: omega, (1, tokens, 1) a sample; None for 1.
        pattern: what the masks must look like.
        masks: keep masks M by Linear, (out, in) bool, at which the block stands.
        statistics: of the inputs of each Linear, as far as anybody asked.
        judge: what E measures an output by; the mean above unless told otherwise.
        updated: weights that a producer changed on purpose, used where its own mask keeps them.
        ranks: that share the samples; all of them ask the same questions in the same order.
        forward_passes: forward passes over all samples, in units of the whole set, be it of the closing Linear alone.
        gradient_passes: forward and backward passes over all samples.
        following: the name of the rebuilder behind the one at work.
        notes: what one rebuilder leaves for the next, so that no pass is made twice.
        behind: what the closing Linear was given in the latest pass, where that was kept.
    """

    forward: Callable[[Tensor], Tensor]
    linears: dict[str, nn.Linear]
    inputs: Activations
    targets: Activations
    pattern: SparsityPattern
    masks: Masks = field(default_factory=dict)
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    token_weights: Activations | None = None
    judge: Judge = SQUARED_ERROR
    updated: dict[str, Tensor] = field(default_factory=dict)
    ranks: Ranks = ALONE
    forward_passes: float = 0.0
    gradient_passes: float = 0.0
    following: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    behind: Behind | None = None
    _errors: list[tuple[Masks, list[float]]] = field(default_factory=list)
    _latest: _Measured | None = None

    def weight(self, name: str, keep: Tensor | None = None) -> Tensor:
        """The weight of one Linear under a mask (None: dense): exact zeros where pruned."""
        dense = self.linears[name].weight.detach()
        return dense if keep is None else kept_or_zero(self.values(name), keep)

    def values(self, name: str) -> Tensor:
        """What each weight of one Linear is worth where it is kept, (out, in)."""
        return self.updated.get(name, self.weight(name))

    def error(self, masks: Masks) -> float:
        """E(M) over all samples."""
        return _mean(self._known(masks) or self._measure(masks).errors)

    def measured(self, masks: Masks) -> bool:
        """Whether E(M) is known already."""
        return self._known(masks) is not None

    def outputs(self, masks: Masks) -> Activations:
        """The block's output under the masks, one tensor a sample."""
        latest = self._latest
        return (latest if latest is not None and latest.masks is masks else self._measure(masks)).outputs

    @torch.no_grad()
    def error_on_every(self, stride: int, masks: Masks) -> float:
        """E(M) over every stride-th sample: cheap, for choosing between candidates."""
        known = self._known(masks)
        if known:
            return _mean(known[::stride])
        with self._wearing(masks):
            errors = [self.judge.error(self.forward(x), y, w) for x, y, w in self.samples(stride=stride)]
        measured = self.ranks.gather(_floats(errors))
        self.forward_passes += len(measured) / self.inputs.total
        return _mean(measured)

    def gradients(self, masks: Masks, expansion: str = "sparse", reduction: str = "rms") -> dict[str, Tensor]:
        """Reduced gradient G >= 0 of each Linear at the masks, (out, in); E(M) is measured on the way.

        `sparse` (paper, Eq. 5-7): the leaf is V = W * M, the target Y is held constant; pruned positions
        get a gradient too. `dense` (published code): V = W, the target Block(W * M, X) is held constant.
        """
        reductions = {name: GradientReduction(reduction) for name in self.linears}
        leaves = self._leaves

        def reduce(error: Tensor, output: Tensor, weights: Tensor | None) -> None:
            backward(error, leaves, lambda name, gradient: reductions[name].add(gradient))

        if expansion == "sparse":
            self.differentiate(masks, reduce)
        else:
            self._differentiated(None, self.outputs(masks), reduce)
        return {name: reduced.result(self.ranks) for name, reduced in reductions.items()}

    def differentiate(self, masks: Masks, see: Callable[[Tensor, Tensor, Tensor | None], None]) -> None:
        """Run the block under the masks on every sample, the Linears' weights W * M being leaves of autograd.

        `see` is shown each sample's error E_s, its output and its tokens' weights; E(M) is measured on the way.
        """
        self.behind = None
        self._make_room()
        errors, outputs = self._differentiated(masks, self.targets, see)
        self._remember(masks, self.ranks.gather(_floats(errors)), outputs)

    def _differentiated(
        self, masks: Masks | None, targets: Activations, see: Callable[[Tensor, Tensor, Tensor | None], None]
    ) -> tuple[list[Tensor], Activations]:
        """The samples' errors and outputs, `see` having been shown each with its graph."""
        errors: list[Tensor] = []

        def seen() -> Iterator[Tensor]:
            for x, y, w in self.samples(targets):
                output = self.forward(x)
                errors.append(self.judge.error(output, y, w))
                see(errors[-1], output, w)
                errors[-1] = errors[-1].detach()
                yield output.detach()

        with self._wearing(masks), differentiable(list(self._leaves.values())):
            outputs = self.inputs.like(seen())
        self.gradient_passes += 1
        return errors, outputs

    def adopt(self, values: dict[str, Tensor]) -> bool:
        """Take new values for the kept weights of some Linears if they lower E at `masks`; whether they did."""
        standing, before = self.updated, self.error(self.masks)
        self.updated = {**standing, **{name: self.ranks.broadcast(value) for name, value in values.items()}}
        self._forget()
        after = self.error(self.masks)
        if after < before:
            return True
        if not math.isfinite(after):
            logger.warning("the error with new weights is %s; the weights stay as they were", after)
        self.updated = standing
        self._forget()
        self._errors.append((self.masks, [before]))
        return False

    @contextmanager
    def trainable(self, masks: Masks) -> Iterator[dict[str, Tensor]]:
        """Inside, the block computes with W * M, and the weights of its Linears, (out, in), can be trained."""
        leaves = self._leaves
        with self._wearing(masks), differentiable(list(leaves.values())):
            yield leaves
        for leaf in leaves.values():
            leaf.grad = None

    @torch.no_grad()
    def commit(self) -> None:
        """Write W * M into the Linears: exact zeros where pruned, dense (or updated) values where kept."""
        for name, linear in self.linears.items():
            linear.weight.data.copy_(self.weight(name, self.masks[name]))

    def watch(self, masks: Masks, see: Callable[[Tensor, Tensor, Tensor | None], None]) -> None:
        """Run the block under the masks on every sample; show `see` each output, its target and its tokens' weights."""
        self.behind = None
        self._run(masks, self.forward, self.samples(), see)

    @torch.no_grad()
    def _run(
        self,
        masks: Masks,
        forward: Callable[[Tensor], Tensor],
        samples: Iterable[tuple[Tensor, Tensor, Tensor | None]],
        see: Callable[[Tensor, Tensor, Tensor | None], None],
    ) -> None:
        self._make_room()
        errors: list[Tensor] = []

        def measured() -> Iterator[Tensor]:
            for x, y, w in samples:
                output = forward(x).view_as(y)
                errors.append(self.judge.error(output, y, w))
                see(output, y, w)
                yield output

        with self._wearing(masks):
            outputs = self.inputs.like(measured())
        self.forward_passes += 1
        self._remember(masks, self.ranks.gather(_floats(errors)), outputs)

    def _measure(self, masks: Masks) -> _Measured:
        behind, self.behind = self.behind, None
        if behind is not None and behind.same(masks):
            samples = ((x, y, w) for x, (_, y, w) in zip(behind.inputs, self.samples(), strict=True))
            self._run(masks, self.linears[behind.name], samples, lambda *_: None)
        else:
            self.watch(masks, lambda *_: None)
        assert self._latest is not None
        return self._latest

    @property
    def _leaves(self) -> dict[str, Tensor]:
        return {name: linear.weight for name, linear in self.linears.items()}

    def _make_room(self) -> None:
        """Before a pass over the samples: without the outputs of the last one, and the pages that it left free."""
        self._latest = None
        heap.give_back(WORTH_TRIMMING)

    def _forget(self) -> None:
        """Errors and outputs that were measured before hold no longer."""
        self._errors, self._latest, self.behind = [], None, None

    def samples(
        self, targets: Activations | None = None, stride: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Input, target (Y unless others are given) and token weights of every stride-th sample."""
        inputs = self.inputs.every(stride)
        weights = [None] * len(inputs) if self.token_weights is None else self.token_weights.every(stride)
        return zip(inputs, (targets or self.targets).every(stride), weights, strict=True)

    def _remember(self, masks: Masks, errors: list[float], outputs: Activations) -> None:
        if self._known(masks) is None:
            self._errors.append((masks, errors))
        self._latest = _Measured(masks, errors, outputs)

    def _known(self, masks: Masks) -> list[float] | None:
        """The samples' errors under masks that were measured before."""
        return next((errors for measured, errors in self._errors if measured is masks), None)

    @contextmanager
    def _wearing(self, masks: Masks | None) -> Iterator[None]:
        """Inside, the block computes with W * M (None: with dense W)."""
        if masks is None:
            yield
            return
        dense = {name: linear.weight.data for name, linear in self.linears.items()}
        for name in self.linears:
            masks[name] = self.ranks.broadcast(masks[name])
        worn = {name: self.weight(name, masks[name]) for name in self.linears}
        try:
            for name, linear in self.linears.items():
                linear.weight.data = worn[name]
            yield
        finally:
            for name, linear in self.linears.items():
                linear.weight.data = dense[name]


def _floats(errors: list[Tensor]) -> list[float]:
    """The samples' errors in one transfer from the device."""
    return torch.stack([error.detach() for error in errors]).tolist() if errors else []


def _mean(errors: list[float]) -> float:
    """Their mean, in float64 and in the order of the samples."""
    return sum(errors) / len(errors)
