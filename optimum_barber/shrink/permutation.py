"""Channels that can change places: what writes them, what reads them, and the permutation of a model's tensors.

A Linear computes the same if its input channels stand in another order, as long as whatever writes them puts them in
that order. FFN channels are rows of gate and up and columns of down. Channels of values are rows of v and, in every
query head of their group, columns of o; queries and keys keep their order, which rotary embeddings need.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.source import ModelSource
from .permute_settings import KINDS
from .units import CHANNELS, HEADS, LayerUnits, Slice, units_of


@dataclass(frozen=True)
class Span:
    """As many rows (axis 0) or columns (axis 1) of a tensor, from `start`, as a site has channels."""

    tensor: str
    axis: int
    start: int

    def part(self, tensor: Tensor, size: int) -> Tensor:
        """Return the view of these rows or columns."""
        return tensor.narrow(self.axis, self.start, size)


@dataclass(frozen=True)
class Site:
    """Channels that can change places among each other, and nothing else changes.

    Attributes:
        name: of the Linear that reads them, for values with the number of their group.
        kind: one of `KINDS`.
        size: how many channels there are.
        written: rows of weights and biases.
        read: columns of a weight, once for every query head.
    """

    name: str
    kind: str
    size: int
    written: tuple[Span, ...]
    read: tuple[Span, ...]

    @property
    def reader(self) -> str:
        """The Linear that reads the channels."""
        return self.read[0].tensor.removesuffix(".weight")

    def columns(self, values: Tensor) -> Tensor:
        """Return the values, (out, in), of the reader's columns: (rows, channels), one reading below another."""
        return torch.cat([span.part(values, self.size) for span in self.read])


def sites_of(source: ModelSource, kinds: Sequence[str] = KINDS) -> list[Site]:
    """Return the sites of all decoder layers, layer after layer.

    Raises:
        BarberError: an unknown family, or layers that differ.
    """
    units = units_of(source)
    sites: list[Site] = []
    for index, layer in enumerate(source.stack):
        names = {name for name, _ in layer.named_parameters()}
        for site in _sites_of_layer(f"{source.path}.{index}", units, names):
            if site.kind in kinds:
                sites.append(site)
    return sites


def _sites_of_layer(layer: str, units: LayerUnits, names: set[str]) -> Iterator[Site]:
    """Yield the sites of a decoder layer whose parameters have these names."""
    heads, channels = units[HEADS], units[CHANNELS]
    *_, value, output = heads.slices
    for group in range(heads.count):
        written = _written(layer, Slice(value.linear, 0, value.start + group * value.width, 1), names)
        starts = range(output.start + group * output.width, output.start + (group + 1) * output.width, value.width)
        read = tuple(Span(f"{layer}.{output.linear}.weight", 1, start) for start in starts)
        yield Site(f"{layer}.{output.linear}.{group}", "values", value.width, written, read)
    *makers, down = channels.slices
    spans: tuple[Span, ...] = ()
    for maker in makers:
        spans += _written(layer, maker, names)
    read = (Span(f"{layer}.{down.linear}.weight", 1, down.start),)
    yield Site(f"{layer}.{down.linear}", "channels", channels.count, spans, read)


def _written(layer: str, part: Slice, names: set[str]) -> tuple[Span, ...]:
    """Return the rows of a Linear's weight and of its bias, if it has one."""
    tensors = [f"{part.linear}.{name}" for name in ("weight", "bias")]
    return tuple(Span(f"{layer}.{name}", 0, part.start) for name in tensors if name in names)


@torch.no_grad()
def permute(tensors: Mapping[str, Tensor], sites: Sequence[Site], orders: Mapping[str, Tensor]) -> None:
    """Permute a model's tensors in place, of one kind of channels after the other.

    Args:
        tensors: weights and biases by name.
        sites: which channels change places.
        orders: by site, (channels,) int64: the channel that stands at each place from now on.
    """
    for site in sites:
        order = orders[site.name]
        for span in (*site.written, *site.read):
            part = span.part(tensors[span.tensor], site.size)
            part.copy_(part.index_select(span.axis, order.to(part.device)))
