"""What this machine does in a second: each kind of `Work`, timed on a small piece at a model's shapes."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...base.memory import return_freed_buffers
from ...checkpoints.stored import StoredWeights
from ...models.activations import Activations
from ...models.device import matrix_products
from ...models.source import ModelSource
from ...tensors.bits import kept_or_zero
from ...tensors.exchange import Ranking
from ...tensors.input_statistics import InputStatistics
from ...tensors.masks import PackedMask, keep_highest
from ...tensors.pair_values import pair_distribution
from ...tensors.patterns import SparsityPattern
from ...tensors.sums import Products, entries
from ...tensors.swaps import TOGETHER, exchange
from ..pipeline import Plan
from ..producers import LinearInput
from ..producers.sparsegpt import inverse_factor, sparsegpt
from ..rebuilders.barber import rank
from ..settings import BarberConfig
from ..streaming.disk import DiskSource
from ..trial import Trial
from .timing import seconds_of, stages
from .work import BlockShape, Tokens, Work, shapes_of, total

SECONDS = 0.05  # that each piece is timed for, at the least
REPEATS = 3
PRODUCT = 2**28  # multiplications of one timed product at most
SCORES = 2**27  # multiplications of timed attention scores, about
LENGTH = 512  # tokens of a timed product at most
WIDTH = 2048  # of a timed Gram matrix at most
COLUMNS = 256  # of the weights that are timed under a producer with Gram matrices
WEIGHTS = 2**19  # that are timed in other work, at most
EXCHANGES = 20  # a row that are timed, at most
BYTES = 2**25  # that are written
READ = 2  # times that a run reads every weight: to check it, and to work on it


def predict(
    source: ModelSource, plan: Plan, config: BarberConfig, windows: tuple[int, int], checkpoint: int, directory: Path
) -> dict[str, float | None]:
    """Seconds that a run will take on this machine, by stages; a second or two are spent on finding out.

    Args:
        source: the decoder layers, which may be without weights.
        plan: producer and pattern.
        config: everything else that decides the run.
        windows: samples and tokens of each.
        checkpoint: bytes that are written of weights and masks.
        directory: where they go; it need not be there.
    """
    config = config.under(plan.pattern, plan.exact)
    return_freed_buffers()  # as a run does, which pays for it
    text = getattr(source.model, "config").get_text_config()  # noqa: B009
    tokens = Tokens(*windows, text.hidden_size)
    shapes = shapes_of(source.stack, source.path, source.architecture, tokens.hidden, config.ignore)
    found = stages(shapes, tokens, config, plan.producer.needs, checkpoint)
    stored = source.disk if isinstance(source, DiskSource) and source.disk.unpacks else None
    if stored:
        found["dequantize"] = Work(unpacked=READ * sum(prod(entry.shape) for entry in stored.entries.values()))
    machine = Machine(
        layer=shapes[: len(shapes) // len(source)],
        tokens=tokens,
        config=config,
        pattern=plan.pattern,
        head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        directory=next(path for path in (directory, *directory.parents) if path.exists()),
        device=source.device,
        stored=stored,
    )
    return seconds_of(found, machine.rates(total(work for work in found.values() if work)))


@dataclass
class Machine:
    """Times pieces of work; every method named as a kind of `Work` gives how much of it is done in a second.

    Attributes:
        layer: the blocks of one decoder layer.
        tokens: what is calibrated on.
        config: of the run.
        pattern: of the masks.
        head: width of an attention head.
        directory: on the disk that is written to.
        device: where layers are worked on.
        stored: weights that are dequantized as they are read; None where they are mapped.
    """

    layer: Sequence[BlockShape]
    tokens: Tokens
    config: BarberConfig
    pattern: SparsityPattern
    head: int
    directory: Path
    device: torch.device
    stored: StoredWeights | None = None

    @torch.no_grad()
    def rates(self, work: Work) -> Work:
        """Rates of the kinds that occur in `work`; leaves the state of the random numbers alone."""
        with torch.random.fork_rng(devices=[]), matrix_products(self.config.precision):
            torch.manual_seed(0)
            return Work(**{kind: getattr(self, kind)() for kind in work.kinds})

    def forward(self) -> float:
        """FLOP a second of the Linears, one after the other."""
        return self._products(lambda x, weight, _: functional.linear(x, weight))

    def backward(self) -> float:
        """FLOP a second of the gradients of their weights."""
        return self._products(lambda x, _, slope: slope.t() @ x)

    def gram(self) -> float:
        """FLOP a second of sums of X^T X."""
        inputs = [self._normal(self._length, min(w, WIDTH)) for block in self.layer for w in block.inputs]
        sums = [Products(symmetric=True) for _ in inputs]
        flops = sum(2 * len(x) * entries(x.shape[1]) for x in inputs)

        def add() -> None:
            for products, x in zip(sums, inputs, strict=True):
                products.add(x, x)

        return self._rate(flops, add)

    def attention(self) -> float:
        """FLOP a second of causal attention, counted as if nothing were masked."""
        heads = self._heads()
        flops = 4 * heads[0].numel() * self.tokens.length
        return self._rate(flops, lambda: _attended(heads))

    def attention_backward(self) -> float:
        """FLOP a second of its gradients."""
        heads = [x.requires_grad_() for x in self._heads()]
        with torch.enable_grad():
            output = _attended(heads)
        slope, flops = torch.ones_like(output), 10 * output.numel() * self.tokens.length
        return self._rate(flops, lambda: torch.autograd.grad(output, heads, slope, retain_graph=True))

    def pointwise(self) -> float:
        """Numbers a second that an activation function and a product go over."""
        left, right = (self._normal(self._length, max(out for out, _ in self._linears)) for _ in range(2))
        return self._rate(left.numel(), lambda: functional.silu(left) * right)

    def weights(self) -> float:
        """Weights a second that are masked."""
        weight, keep = self._weight, self._keep
        return self._rate(weight.numel(), lambda: kept_or_zero(weight, keep))

    def chosen(self) -> float:
        """Weights a second among which the producer chooses."""
        if self.config.producer != "sparsegpt":
            return self._rate(self._weight.numel(), lambda: keep_highest(self._weight.abs(), self.pattern))
        gram = InputStatistics(gram=self._gram(COLUMNS))
        linear = LinearInput("", self._normal(self._linears[0][0], COLUMNS), self.pattern, gram)
        return self._rate(linear.weight.numel(), lambda: sparsegpt(linear))

    def factored(self) -> float:
        """FLOP a second of a Cholesky factor, an inverse and another factor."""
        gram = self._gram(2 * COLUMNS)
        return self._rate(4 * len(gram) ** 3 / 3, lambda: inverse_factor(gram, 0.01, ""))

    def ranked(self) -> float:
        """Weights a second that Barber ranks, and whose pair values it looks at."""

        def look() -> None:
            ranking = self._ranking()
            ranking.outlier_share(), pair_distribution(ranking.values(), ranking.pairs)

        return self._rate(self._weight.numel(), look)

    def applied(self) -> float:
        """Weights a second whose masks are made from a ranking."""
        ranking = self._ranking()
        ratio = self.config.rebuild.rebuild_ratio
        return self._rate(self._weight.numel(), lambda: ranking.at(0.1 if ratio == "auto" else ratio))

    def exchanged(self) -> float:
        """Weights times exchanges a second."""
        most, group = min(self.config.rebuild.swaps, EXCHANGES), self.pattern.group or None
        amount = seconds = 0.0
        for width in {min(w, WIDTH // (group or 1) * (group or 1)) for block in self.layer for w in block.inputs}:
            values, gram = self._normal(max(TOGETHER // width, 1), width), self._gram(width)
            keep = keep_highest(values.abs(), self.pattern)
            work = values, keep, gram, (values * ~keep) @ gram, most, group
            amount += most * values.numel()
            seconds += 1 / self._rate(1, lambda work=work: exchange(*work))  # type: ignore[misc]
        return amount / seconds

    def kept(self) -> float:
        """Weights a second that are checked, packed, hashed, unpacked and verified."""

        def keep() -> None:
            self._weight.aminmax()
            packed = PackedMask.pack(self._keep)
            (self._weight[~packed.unpack().to(self.device)] == 0).count_nonzero(), packed.sha256, packed.pruned

        return self._rate(self._weight.numel(), keep)

    def written(self) -> float:
        """Bytes a second that reach the disk."""
        content = bytes(BYTES)
        with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:

            def write() -> None:
                file.seek(0)
                file.write(content)
                os.fsync(file.fileno())

            return self._rate(BYTES, write)

    def unpacked(self) -> float:
        """Weights a second that are dequantized, by the smallest matrix of the file."""
        assert self.stored is not None
        stored, entries = self.stored, self.stored.entries
        name = min((n for n in entries if len(entries[n].shape) > 1), key=lambda n: prod(entries[n].shape))
        return self._rate(prod(entries[name].shape), lambda: stored.tensor(name))

    def _rate(self, amount: float, work: Callable[[], Any]) -> float:
        """Amount over the median time of some runs, after one that is not timed."""
        work()
        seconds: list[float] = []
        while len(seconds) < REPEATS or sum(seconds) < SECONDS:
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return amount / median(seconds)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _products(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        pieces = []
        for out, width in self._linears:
            out = min(out, max(PRODUCT // (self._length * width), 64))
            pieces.append(tuple(self._normal(*s) for s in ((self._length, width), (out, width), (self._length, out))))
        flops = sum(2 * x.numel() * len(weight) for x, weight, _ in pieces)
        return self._rate(flops, lambda: [product(*piece) for piece in pieces])

    def _heads(self) -> list[Tensor]:
        """Queries, keys and values of as many heads as can be timed, (1, heads, length, size)."""
        scores = max(block.scores for block in self.layer)
        heads = max(min(scores // self.head, SCORES // (self.tokens.length**2 * self.head)), 1)
        return [self._normal(1, heads, self.tokens.length, self.head) for _ in range(3)]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def _gram(self, width: int) -> Tensor:
        x = self._normal(COLUMNS, width)
        return x.t() @ x

    def _ranking(self) -> Ranking:
        """Barber's, of a Linear with random gradients."""
        linear = nn.Linear(self._weight.shape[1], len(self._weight), bias=False)
        linear.weight.data = self._weight
        none = Activations([])
        trial = Trial(linear, {"": linear}, none, none, self.pattern)
        return rank(trial, self.config.rebuild, {"": self._keep}, {"": torch.rand_like(self._weight)})

    @property
    def _length(self) -> int:
        return min(self.tokens.length, LENGTH)

    @property
    def _linears(self) -> list[tuple[int, int]]:
        return [linear for block in self.layer for linear in (*block.linears, *block.dense)]

    @cached_property
    def _weight(self) -> Tensor:
        """Rows of the layer's largest Linear."""
        out, width = max(self._linears, key=lambda shape: shape[0] * shape[1])
        return self._normal(min(out, max(WEIGHTS // width, 1)), width)

    @cached_property
    def _keep(self) -> Tensor:
        return keep_highest(self._weight.abs(), self.pattern)


def _attended(heads: list[Tensor]) -> Tensor:
    query, key, value = heads
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
