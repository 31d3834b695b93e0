"""APTQ (arXiv 2402.14866): Hessians of attention projections by attention's output, and the bits that follow."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_barber.base.errors import BarberError
from optimum_barber.models.architectures import ARCHITECTURES, Structure, architecture_of
from optimum_barber.models.blocks import DecoderLayer
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.trial import Trial
from optimum_barber.shrink.scan import dense_pass
from optimum_barber.tensors.input_statistics import InputStatistics
from optimum_barber.tensors.sums import Products

NORM = frozenset({"input_norm"})
DRAWS = 4  # of signs for each window


@dataclass
class Capture:
    """What passes attention for one window.

    Attributes:
        inputs: of the projections of queries, keys and values, (tokens, in), by name.
        outputs: of these, as leaves of autograd.
        heads: F, what the output projection is given.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    heads: Tensor | None = None

    def projection(self, name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Cut the graph behind a projection."""
        self.inputs[name] = args[0].detach().flatten(0, -2)
        self.outputs[name] = leaf = output.detach().requires_grad_()
        return leaf

    def slopes(self, seed: int) -> dict[str, Tensor]:
        """Return d(F . u) / dW of every projection for random signs u, (out, in), over the root of out * `DRAWS`."""
        assert self.heads is not None
        with torch.enable_grad():
            product = (self.heads * random_signs(self.heads, seed)).sum()
        gradients = torch.autograd.grad(product, list(self.outputs.values()), retain_graph=True)
        slopes = {}
        for name, gradient in zip(self.outputs, gradients, strict=True):
            rows = gradient.flatten(0, -2).t()
            slopes[name] = rows @ self.inputs[name] / math.sqrt(len(rows) * DRAWS)
        return slopes

    def reached(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep what the output projection is given."""
        self.heads = args[0]


@contextmanager
def captured(linears: Mapping[str, nn.Linear], output: nn.Module) -> Iterator[Capture]:
    """Inside, a call of attention is captured; `linears` are its projections of queries, keys and values."""
    capture = Capture()
    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(partial(capture.projection, name)).remove)
        stack.callback(output.register_forward_pre_hook(capture.reached).remove)
        yield capture


def structure_of(source: ModelSource) -> Structure:
    """Return which Linears attention has.

    Raises:
        BarberError: that is not known of the family.
    """
    structure = architecture_of(source.model).structure
    if structure is None:
        known = [name for name, architecture in ARCHITECTURES.items() if architecture.structure is not None]
        raise BarberError(
            f"method 'aptq' does not know the attention of {source.model_type}: give gptq, or a model of "
            + ", ".join(known)
        )
    return structure


def attention_statistics(structure: Structure, layer: DecoderLayer, trial: Trial) -> dict[str, InputStatistics]:
    """Return the Gram matrices of the projections of queries, keys and values by what they do to attention's output F.

    Around the weights w of one row, |F(w + d) - F(w)|^2 is about d^T H d with H = sum over the entries f of F of
    (df / dw)^T (df / dw) (Levenberg-Marquardt). All rows get the mean H of the Linear. It is estimated by random sign
    vectors u, `DRAWS` of them for each window: H is the mean of (dF.u / dw)^T (dF.u / dw) over them.

    Returns:
        By the Linear's name, `gram` = H, (in, in) float32; empty for blocks without attention.
    """
    names = dict.fromkeys(f"{layer.name}.{name}" for name in structure.attention)
    projections = {name: trial.linears[name] for name in names if name in trial.linears}
    output = layer.module.get_submodule(structure.output)
    if not projections:
        return {}
    grams = {name: Products(symmetric=True) for name in projections}
    tokens = 0
    for index, x in enumerate(trial.inputs):
        with captured(projections, output) as capture, torch.enable_grad():
            trial.forward(x)
        for draw in range(DRAWS):
            for name, slopes in capture.slopes(DRAWS * index + draw).items():
                grams[name].add(slopes, slopes)
        tokens += len(capture.inputs[next(iter(projections))])
    return {name: InputStatistics(gram=gram.over(trial.ranks), tokens=tokens) for name, gram in grams.items()}


def random_signs(like: Tensor, seed: int) -> Tensor:
    """Return -1 and 1, as likely, of the shape of a tensor; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * drawn - 1).to(like)


@torch.no_grad()
def sensitivities(source: ModelSource, windows: Tensor, quiet: bool = False) -> dict[str, float]:
    """Return the mean trace of each Linear's Hessian a token, tr(2 H) / (in * tokens), on the dense stream.

    H is that of `attention_statistics` for queries, keys and values, else the Gram matrix of the Linear's input.
    """
    structure = structure_of(source)
    traces: dict[str, float] = {}
    with tqdm(total=2 * len(source), unit="block", desc="sensitivity", disable=quiet or None) as bar:
        for layer, _, trial in dense_pass(source, windows, NORM):
            for name, statistics in trial.statistics.items():
                assert statistics.input_norm is not None
                squares = float(statistics.input_norm.double().square().sum())
                traces[name] = mean_trace(squares, trial.linears[name], statistics.tokens)
            for name, statistics in attention_statistics(structure, layer, trial).items():
                assert statistics.gram is not None
                trace = float(statistics.gram.diagonal().double().sum())
                traces[name] = mean_trace(trace, trial.linears[name], statistics.tokens)
            bar.update()
    return traces


def mean_trace(trace: float, linear: nn.Linear, tokens: int) -> float:
    """Return the mean diagonal entry of 2 H a token."""
    return 2 * trace / (linear.in_features * max(tokens, 1))


def fused_units(structure: Structure, names: Sequence[str]) -> list[list[str]]:
    """Group Linears that runtimes fuse into one matrix: queries, keys and values of a layer, and its gate and up."""
    units: dict[str, list[str]] = {}
    for name in names:
        unit = name
        for parts in (structure.attention, structure.makers):
            for part in parts:
                if name.endswith(f".{part}"):
                    unit = name.removesuffix(part) + parts[0]
        units.setdefault(unit, []).append(name)
    return list(units.values())


def mixed_bits(
    units: Sequence[Sequence[str]],
    sensitivity: Mapping[str, float],
    sizes: Mapping[str, int],
    average: float,
    widths: tuple[int, int],
) -> dict[str, int]:
    """Return the fewer or the more bits for every Linear, so that a weight has at most `average` bits in the mean.

    The most sensitive units get the more, as long as they fit.

    Args:
        units: Linears that get the same bits; a unit is as sensitive as its weights in the mean.
        sensitivity: by Linear.
        sizes: weights of each Linear.
        average: from the fewer bits to the more.
        widths: the fewer and the more bits.
    """
    low, high = widths
    bits = dict.fromkeys(sizes, low)
    room = (average - low) / (high - low) * sum(sizes.values())
    ranked: list[tuple[float, int, Sequence[str]]] = []
    for unit in units:
        weights = sum(sizes[name] for name in unit)
        trace = sum(sensitivity[name] * sizes[name] for name in unit)
        ranked.append((trace / weights, weights, unit))
    ranked.sort(key=itemgetter(0), reverse=True)
    for _, weights, unit in ranked:
        if weights <= room * (1 + 1e-9):
            bits |= dict.fromkeys(unit, high)
            room -= weights
    return bits


def mean_bits(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Return the bits of a weight in the mean."""
    total: Any = sum(bits[name] * size for name, size in sizes.items())
    return total / sum(sizes.values())
