"""Channels that can change places: what writes them, what reads them, and the permutation of a model's tensors.

A Linear computes the same if its input channels stand in another order, as long as whatever writes them puts them in
that order. FFN channels are rows of gate and up and columns of down. Channels of values are rows of v and, in every
query head of their group, columns of o; queries and keys keep their order, which rotary embeddings need. Channels of
the residual stream are columns of all that reads it, rows of all that adds to it, and parts of embeddings and norms.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..models.source import ModelSource
from .permute_settings import KINDS
from .units import CHANNELS, HEADS, LayerUnits, Slice, structure_of, units_of


@dataclass(frozen=True)
class Span:
    """As many rows (axis 0) or columns (axis 1) of a tensor, from `start`, as a site has channels."""

    tensor: str
    axis: int
    start: int = 0

    @property
    def linear(self) -> str:
        """The Linear whose weight this is of."""
        return self.tensor.removesuffix(".weight")

    def part(self, tensor: Tensor, size: int) -> Tensor:
        """Return the view of these rows or columns."""
        return tensor.narrow(self.axis, self.start, size)


@dataclass(frozen=True)
class Site:
    """Channels that can change places among each other, and nothing else changes.

    Attributes:
        name: of the Linear that reads them, for values with the number of their group; or "stream".
        kind: one of `KINDS`.
        size: how many channels there are.
        read: columns of the weights of prunable Linears; of one Linear several times, once for every query head.
        moved: what else is reordered with them: rows of weights and biases, embeddings, norms.
    """

    name: str
    kind: str
    size: int
    read: tuple[Span, ...]
    moved: tuple[Span, ...]


def sites_of(source: ModelSource, kinds: Collection[str] = KINDS) -> list[Site]:
    """Return the sites of all decoder layers, layer after layer, and the one of the residual stream.

    Raises:
        BarberError: an unknown family, layers that differ, or a part whose channels of the stream are not known.
    """
    units = units_of(source)
    sites: list[Site] = []
    for index, layer in enumerate(source.stack):
        names = {name for name, _ in layer.named_parameters()}
        for site in _sites_of_layer(f"{source.path}.{index}", units, names):
            if site.kind in kinds:
                sites.append(site)
    if "stream" in kinds:
        sites.append(_stream(source))
    return sites


def _sites_of_layer(layer: str, units: LayerUnits, names: set[str]) -> Iterator[Site]:
    """Yield the sites of a decoder layer whose parameters have these names."""
    heads, channels = units[HEADS], units[CHANNELS]
    *_, value, output = heads.slices
    for group in range(heads.count):
        moved = _rows(layer, Slice(value.linear, 0, value.start + group * value.width, 1), names)
        starts = range(output.start + group * output.width, output.start + (group + 1) * output.width, value.width)
        read = tuple(Span(f"{layer}.{output.linear}.weight", 1, start) for start in starts)
        yield Site(f"{layer}.{output.linear}.{group}", "values", value.width, read, moved)
    *makers, down = channels.slices
    spans: tuple[Span, ...] = ()
    for maker in makers:
        spans += _rows(layer, maker, names)
    read = (Span(f"{layer}.{down.linear}.weight", 1, down.start),)
    yield Site(f"{layer}.{down.linear}", "channels", channels.count, read, spans)


def _rows(layer: str, part: Slice, names: set[str]) -> tuple[Span, ...]:
    """Return the rows of a Linear's weight and of its bias, if it has one."""
    tensors = [f"{part.linear}.{name}" for name in ("weight", "bias")]
    return tuple(Span(f"{layer}.{name}", 0, part.start) for name in tensors if name in names)


def _stream(source: ModelSource) -> Site:
    """Return the site of the residual stream: everything in the model that has its channels."""
    structure, model = structure_of(source), cast(Any, source.model)
    size = model.config.get_text_config().hidden_size
    read: list[Span] = []
    moved: list[Span] = []
    inside: set[str] = set()
    for index, layer in enumerate(source.stack):
        for name, parameter in layer.named_parameters():
            tensor, module = f"{source.path}.{index}.{name}", name.rpartition(".")[0]
            inside.add(tensor)
            if module in (*structure.attention, *structure.makers):
                if parameter.ndim == 2:
                    read.append(Span(tensor, 1))
            elif module in (structure.output, structure.down) or _is_norm(module, parameter, size):
                moved.append(Span(tensor, 0))
    for name, parameter in model.named_parameters():
        span = _outer_span(model, name, parameter, size) if name not in inside else None
        if span is not None:
            moved.append(span)
    return Site("stream", "stream", size, tuple(read), tuple(moved))


def _is_norm(module: str, parameter: Tensor, size: int) -> bool:
    """Return whether a parameter is a norm's of the stream; those inside attention are of queries and keys."""
    return "." not in module and parameter.shape == (size,)


def _outer_span(model: Any, name: str, parameter: Tensor, size: int) -> Span | None:
    """Return the channels of the residual stream in a parameter outside of the decoder layers; None if it has none."""
    module = model.get_submodule(name.rpartition(".")[0])
    words = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
    if words and parameter.ndim == 1:
        return None  # the bias of the head, one a word
    axis = 1 if words else 0
    if parameter.ndim == axis + 1 and parameter.shape[axis] == size:
        return Span(name, axis)
    raise BarberError(f"kind 'stream' cannot be reordered in {name}: leave it out, with --kinds channels values")


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
        for span in (*site.read, *site.moved):
            part = span.part(tensors[span.tensor], site.size)
            part.copy_(part.index_select(span.axis, order.to(part.device)))
