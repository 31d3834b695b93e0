"""APTQ (arXiv 2402.14866): Hessians of attention projections by attention's output, and the bits that follow."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_barber.base.errors import BarberError
from optimum_barber.models.architectures import Structure, architecture_of
from optimum_barber.models.blocks import DecoderLayer
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.trial import Trial
from optimum_barber.shrink.scan import dense_pass
from optimum_barber.tensors.input_statistics import InputStatistics
from optimum_barber.tensors.sums import Products

NORM = frozenset({"input_norm"})


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
        raise BarberError(
            f"method 'aptq' does not know the attention of {source.model_type}: give gptq, or bits_of by glob"
        )
    return structure


def attention_statistics(structure: Structure, layer: DecoderLayer, trial: Trial) -> dict[str, InputStatistics]:
    """Return the Gram matrices of the projections of queries, keys and values by what they do to attention's output F.

    Around the weights w of one row, |F(w + d) - F(w)|^2 is about d^T H d with H = sum over tokens t of c_t x_t x_t^T,
    c_t = |dF / dy_t|^2 for the row's output y_t at the token (Levenberg-Marquardt). All rows get the mean c_t of the
    Linear. It is estimated by one random sign vector u for each window: E (dF / dy_t . u)^2 = |dF / dy_t|^2.

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
            assert capture.heads is not None
            signs = random_signs(capture.heads, index)
            gradients = torch.autograd.grad((capture.heads * signs).sum(), list(capture.outputs.values()))
        for name, gradient in zip(capture.outputs, gradients, strict=True):
            weight = gradient.flatten(0, -2).square().mean(1, keepdim=True).sqrt()
            scaled = weight * capture.inputs[name]
            grams[name].add(scaled, scaled)
        tokens += gradients[0][..., 0].numel()
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


def mixed_bits(sensitivity: Mapping[str, float], sizes: Mapping[str, int], average: float) -> dict[str, int]:
    """Return 2 or 4 bits for every Linear, or 4 or 8, so that a weight has at most `average` bits in the mean.

    The most sensitive Linears get the more, as long as they fit.

    Args:
        sensitivity: by Linear.
        sizes: weights of each Linear.
        average: from 2 to 8.
    """
    low, high = (2, 4) if average < 4 else (4, 8)
    bits = dict.fromkeys(sizes, low)
    room = (average - low) / (high - low) * sum(sizes.values())
    for name in sorted(sizes, key=lambda name: sensitivity[name], reverse=True):
        if sizes[name] <= room * (1 + 1e-9):
            bits[name] = high
            room -= sizes[name]
    return bits


def mean_bits(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Return the bits of a weight in the mean."""
    total: Any = sum(bits[name] * size for name, size in sizes.items())
    return total / sum(sizes.values())
