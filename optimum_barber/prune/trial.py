"""One block on trial: its dense weights, its keep masks, and the error that the masks cause."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.memory import WORTH_TRIMMING, heap
from ..base.ranks import ALONE, Ranks
from ..models.activations import Activations
from ..tensors.derivatives import backward, differentiable
from ..tensors.input_statistics import InputStatistics
from ..tensors.masks import kept_or_zero
from ..tensors.objectives import SQUARED_ERROR, Objective
from ..tensors.patterns import SparsityPattern
from ..tensors.scores import GradientReduction
from .block_cache import BlockCache, Masks, MaskVersion, SharedPass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleResult:
    """What the block gives for one sample: its error, a scalar, and its output, (1, tokens, channels)."""

    error: Tensor
    output: Tensor
    target: Tensor
    token_weights: Tensor | None


Forward = Callable[[Tensor], Tensor]
Sample = tuple[Tensor, Tensor, Tensor | None]  # input, target, token weights
Observer = Callable[[SampleResult], None]
Measured = tuple[list[float], Activations]  # errors of the samples of all ranks; outputs of this one


@dataclass
class Trial:
    """What a rebuilder sees of a block: propose masks, ask for their error and gradients.

    E(M) = mean(omega (Block(W * M, X) - Y)^2) over samples, tokens and channels; Y = Block(W, X) is the dense
    output on the sparse stream X, omega a weight for every token, by default 1. Every sample is computed on
    its own and sums run in the order of the samples. E is measured once for the same mask tensors, until one of them
    or a weight is written to.

    Several ranks hold a share of the samples each and call the same methods in the same order. Errors and gradients are
    over the samples of all ranks; the masks that are measured are the first rank's, so all decide alike.

    Attributes:
        linears: the Linears by name; outside of this class's methods their weights are dense W, (out, in).
        inputs: X, one tensor a sample; `targets` is Y, `token_weights` is omega, (1, tokens, 1), None for 1.
        masks: keep masks M by Linear, (out, in) bool, at which the block stands.
        updated: new weights of a producer or reconstruction, used where the mask keeps them; set by `use_values`.
        forward_passes: in units of the whole set of samples, as `gradient_passes`, be it of the closing Linear alone.
        shared_pass: the pass that the next rebuilder of the chain starts with.
        leaves_closing: whether the closing Linear's exchanges are left to the next rebuilder.
        sums_on: the device on which Gram matrices and correlations wait; None for that of the block.
    """

    forward: Forward
    linears: dict[str, nn.Linear]
    inputs: Activations
    targets: Activations
    pattern: SparsityPattern
    masks: Masks = field(default_factory=dict)
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    token_weights: Activations | None = None
    objective: Objective = SQUARED_ERROR
    updated: dict[str, Tensor] = field(default_factory=dict)
    ranks: Ranks = ALONE
    forward_passes: float = 0.0
    gradient_passes: float = 0.0
    shared_pass: SharedPass | None = None
    leaves_closing: bool = False
    sums_on: torch.device | None = None
    cache: BlockCache = field(default_factory=BlockCache)

    def weight(self, name: str, keep: Tensor | None = None) -> Tensor:
        """The weight of one Linear under a mask (None: dense): exact zeros where pruned."""
        if keep is None:
            return self.linears[name].weight.detach()
        return kept_or_zero(self.values(name), keep)

    def values(self, name: str) -> Tensor:
        """The value that each weight of one Linear has where it is kept, (out, in)."""
        return self.updated.get(name, self.weight(name))

    def error(self, masks: Masks) -> float:
        """E(M) over all samples."""
        errors = self.cache.errors_of(masks)
        if errors is None:
            errors, _ = self._measure(masks)
        return _mean(errors)

    def outputs(self, masks: Masks) -> Activations:
        """The block's output under the masks, one tensor a sample."""
        latest = self.cache.latest
        if latest is not None and latest[0].matches(masks):
            return latest[1]
        _, outputs = self._measure(masks)
        return outputs

    @torch.no_grad()
    def error_on_every(self, stride: int, masks: Masks) -> float:
        """E(M) over every stride-th sample: cheap, for choosing between candidates."""
        known = self.cache.errors_of(masks)
        if known is not None:
            return _mean(known[::stride])
        with self._masked_weights(masks):
            errors = [result.error for result in self.results(self.samples(stride=stride))]
        measured = self.ranks.gather(_floats(errors))
        self.forward_passes += len(measured) / self.inputs.total
        return _mean(measured)

    def share_last_pass(self, masks: Masks) -> None:
        """Measure the last masks of a rebuilder by the pass that the next one starts with, if it has one to share."""
        if self.shared_pass is None or self.cache.errors_of(masks) is not None:
            return
        statistics = self.shared_pass.measure(self, masks, self.shared_pass.config)
        self.cache.shared = self.shared_pass, MaskVersion(masks), statistics

    def gradients(self, masks: Masks, expansion: str = "sparse", reduction: str = "rms") -> dict[str, Tensor]:
        """Reduced gradient G >= 0 of each Linear at the masks, (out, in); E(M) is measured on the way.

        `sparse` (paper, Eq. 5-7): the leaf is V = W * M, the target Y is held constant; pruned positions
        get a gradient too. `dense` (published code): V = W, the target Block(W * M, X) is held constant.
        """
        reductions = {name: GradientReduction(reduction) for name in self.linears}
        leaves = self._leaves()

        def reduce(result: SampleResult) -> None:
            backward(result.error, leaves, lambda name, gradient: reductions[name].add(gradient))

        if expansion == "sparse":
            self.differentiate(masks, reduce)
        else:
            targets = self.outputs(masks)
            with differentiable(list(leaves.values())):
                for result in self.results(self.samples(targets)):
                    reduce(result)
            self.gradient_passes += 1
        return {name: reduced.result(leaves[name], self.ranks) for name, reduced in reductions.items()}

    def watch(self, masks: Masks, observe: Observer | None = None) -> Measured:
        """Run the block under the masks on every sample, show `observe` each result, and measure E(M)."""
        self.cache.closing_inputs = None
        self.forward_passes += 1
        return self._pass(masks, self.results(self.samples()), observe, torch.no_grad())

    def differentiate(self, masks: Masks, observe: Observer) -> None:
        """Do as `watch` does with the weights W * M of the Linears as leaves of autograd."""
        self.cache.closing_inputs = None
        self.gradient_passes += 1
        self._pass(masks, self.results(self.samples()), observe, differentiable(list(self._leaves().values())))

    def results(self, samples: Iterable[Sample], forward: Forward | None = None) -> Iterator[SampleResult]:
        """Run the block, or the Linear that closes it, on each sample: the one place where errors are measured."""
        forward = forward or self.forward
        for x, target, token_weights in samples:
            output = forward(x).view_as(target)
            yield SampleResult(self.objective.error(output, target, token_weights), output, target, token_weights)

    def samples(
        self, targets: Activations | None = None, stride: int = 1, inputs: Iterable[Tensor] | None = None
    ) -> Iterator[Sample]:
        """Input (X by default), target (Y by default) and token weights of every stride-th sample."""
        some = self.inputs.every(stride)
        weights = [None] * len(some) if self.token_weights is None else self.token_weights.every(stride)
        return zip(inputs or some, (targets or self.targets).every(stride), weights, strict=True)

    def use_values(self, values: dict[str, Tensor]) -> None:
        """Set `updated`, by Linear; what was measured with other values is dropped."""
        cache, self.updated = self.cache, values
        cache.errors, cache.latest, cache.closing_inputs, cache.shared = [], None, None, None

    def adopt(self, values: dict[str, Tensor]) -> bool:
        """Take new values for the kept weights of some Linears if they lower E at `masks`; whether they did."""
        standing, before = self.updated, self.error(self.masks)
        self.use_values({**standing, **{name: self.ranks.broadcast(value) for name, value in values.items()}})
        after = self.error(self.masks)
        if after < before:
            return True
        if not math.isfinite(after):
            logger.warning("the error with new weights is %s; the weights stay as they were", after)
        self.use_values(standing)
        self.cache.errors.append((MaskVersion(self.masks), [before]))  # the mean stands for all samples
        return False

    @contextmanager
    def trainable(self, masks: Masks) -> Iterator[dict[str, Tensor]]:
        """Inside, the block computes with W * M, and the weights of its Linears, (out, in), can be trained."""
        leaves = self._leaves()
        with self._masked_weights(masks), differentiable(list(leaves.values())):
            yield leaves
        for leaf in leaves.values():
            leaf.grad = None

    @torch.no_grad()
    def commit(self) -> None:
        """Write W * M into the Linears: exact zeros where pruned, dense (or updated) values where kept."""
        for name, linear in self.linears.items():
            linear.weight.data.copy_(self.weight(name, self.masks[name]))

    def _measure(self, masks: Masks) -> Measured:
        closing, self.cache.closing_inputs = self.cache.closing_inputs, None
        if closing is None or not closing[1].matches(masks, but=closing[0]):
            return self.watch(masks)
        name, _, inputs = closing
        self.forward_passes += 1
        return self._pass(masks, self.results(self.samples(inputs=inputs), self.linears[name]), None, torch.no_grad())

    def _pass(
        self,
        masks: Masks,
        results: Iterator[SampleResult],
        observe: Observer | None,
        gradient_mode: AbstractContextManager[None],
    ) -> Measured:
        """Compute the results under the masks; remember and return the errors of all ranks, and the outputs."""
        self.cache.latest = None  # frees the outputs of the pass before
        heap.give_back(WORTH_TRIMMING)
        errors: list[Tensor] = []

        def outputs() -> Iterator[Tensor]:
            for result in results:
                if observe is not None:
                    observe(result)
                errors.append(result.error.detach())
                yield result.output.detach()

        with self._masked_weights(masks), gradient_mode:
            kept = self.inputs.like(outputs())
        gathered, version = self.ranks.gather(_floats(errors)), MaskVersion(masks)
        if self.cache.errors_of(masks) is None:
            self.cache.errors.append((version, gathered))
        self.cache.latest = version, kept
        return gathered, kept

    def _leaves(self) -> dict[str, Tensor]:
        return {name: linear.weight for name, linear in self.linears.items()}

    @contextmanager
    def _masked_weights(self, masks: Masks) -> Iterator[None]:
        """Compute with W * M inside; masks in the dictionary that differ from the first rank's are replaced."""
        if self.ranks.count > 1:
            for name in self.linears:
                first = self.ranks.broadcast(masks[name].clone())
                if not torch.equal(first, masks[name]):
                    masks[name] = first
        dense = {name: linear.weight.data for name, linear in self.linears.items()}
        masked = {name: self.weight(name, masks[name]) for name in self.linears}
        try:
            self._set_weights(masked)
            yield
        finally:
            self._set_weights(dense)

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        for name, linear in self.linears.items():
            linear.weight.data = weights[name]


def _floats(errors: list[Tensor]) -> list[float]:
    return torch.stack(errors).tolist() if errors else []  # in one transfer from the device


def _mean(errors: list[float]) -> float:
    return sum(errors) / len(errors)  # in float64 and in the order of the samples
