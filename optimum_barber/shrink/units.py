"""What belongs to a head, a key-value group or an FFN channel: which rows and columns of which Linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..models.architectures import ARCHITECTURES, Structure
from ..models.blocks import Block
from ..models.source import ModelSource
from ..tensors.unit_scores import unit_sums

HEADS, CHANNELS = "heads", "channels"
KIND_OF_BLOCK = {"attention": HEADS, "mlp": CHANNELS}


@dataclass(frozen=True)
class Slice:
    """The part of a Linear that belongs to the units of a layer, unit after unit.

    Attributes:
        linear: name in the decoder layer.
        axis: 0 for rows (with their biases), 1 for columns.
        start: where unit 0 begins.
        width: rows or columns of one unit.
    """

    linear: str
    axis: int
    start: int
    width: int


@dataclass(frozen=True)
class Units:
    """The heads or the FFN channels of one decoder layer.

    Attributes:
        kind: "heads" or "channels".
        count: how many units there are.
        slices: what belongs to them; the last one is the columns of the Linear that reads them.
        groups: units come in so many groups, of which every one keeps the same number.
        heads: query heads in one unit.
        alone: whether query heads go without their keys and values, which other heads read too.
    """

    kind: str
    count: int
    slices: tuple[Slice, ...]
    groups: int = 1
    heads: int = 1
    alone: bool = False

    @property
    def reader(self) -> str:
        """The Linear that reads the units."""
        return self.slices[-1].linear

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum of the values, (out, in) by Linear, of each unit, (count,); Linears without values count 0."""
        parts = []
        for part in self.slices:
            if part.linear in values:
                parts.append(unit_sums(values[part.linear], part.axis, part.start, part.width, self.count))
        return torch.stack(parts).sum(0)

    def kept(self, units: Sequence[int], size: int, linear: str, axis: int) -> Tensor:
        """Which rows or columns of a Linear stay where `units` stay, (size,) bool; what is no unit's stays."""
        keep = torch.ones(size, dtype=torch.bool)
        stays = torch.zeros(self.count, dtype=torch.bool)
        stays[list(units)] = True
        for part in self.slices:
            if (part.linear, part.axis) == (linear, axis):
                keep[part.start : part.start + part.width * self.count] = stays.repeat_interleave(part.width)
        return keep

    def parameters(self, layer: nn.Module) -> int:
        """Weights and biases of one unit."""
        total = 0
        for part in self.slices:
            linear = linear_of(layer, part.linear)
            rows = linear.weight.shape[1] + (linear.bias is not None)
            total += part.width * (rows if part.axis == 0 else linear.weight.shape[0])
        return total

    @property
    def name(self) -> str:
        """What a unit is called in the record."""
        if self.kind == CHANNELS:
            return "channel"
        if self.alone:
            return "query head"
        return "key-value group" if self.heads > 1 else "head"


LayerUnits = dict[str, Units]  # by kind; all decoder layers are alike
Kept = dict[str, dict[str, list[int]]]  # units that stay, by decoder layer and kind


def kind_of(block: Block) -> str:
    """The kind of units in a block."""
    return KIND_OF_BLOCK[block.name.rpartition(".")[2]]


def linears_of_units(units: LayerUnits) -> dict[str, Units]:
    """The Linears of a decoder layer that hold units, and which."""
    linears: dict[str, Units] = {}
    for unit in units.values():
        linears |= {part.linear: unit for part in unit.slices}
    return linears


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name in a decoder layer."""
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def structure_of(source: ModelSource) -> Structure:
    """The table's row on heads and channels; a family that has none is refused."""
    structure = source.architecture.structure if source.model_type in ARCHITECTURES else None
    if structure is None:
        known = [name for name in ARCHITECTURES if ARCHITECTURES[name].structure is not None]
        raise BarberError(
            f"heads and channels of model type {source.model_type!r} are not known: known are {', '.join(known)}"
        )
    return structure


def units_of(source: ModelSource, head_unit: str = "group") -> LayerUnits:
    """Heads and channels of a decoder layer, the same in every layer.

    A `head_unit` is a "group", a KV head with all its query heads; or a "query" head, of which every KV head keeps the
    same number.

    Raises:
        BarberError: an unknown family, heads that do not divide, or layers that differ.
    """
    structure = structure_of(source)
    shapes = [_shapes(layer, structure) for layer in source.stack]
    for index, shape in enumerate(shapes):
        for name, (rows, columns) in shape.items():
            first = shapes[0][name]
            if (rows, columns) != first:
                raise BarberError(
                    f"model is cut unevenly already: {source.path}.{index}.{name} is {rows}x{columns}, "
                    f"that of layer 0 {first[0]}x{first[1]}; every layer must have the same width"
                )
    heads = _heads(shapes[0], structure, source.model.config, head_unit)
    return {HEADS: heads, CHANNELS: _channels(shapes[0], structure)}


def _shapes(layer: nn.Module, structure: Structure) -> dict[str, tuple[int, int]]:
    shapes = {}
    for name in (*structure.attention, structure.output, *structure.makers, structure.down):
        linear = linear_of(layer, name)
        shapes[name] = (linear.out_features, linear.in_features)
    return shapes


def _heads(shapes: dict[str, tuple[int, int]], structure: Structure, config: Any, unit: str) -> Units:
    heads, width = config.get_text_config().num_attention_heads, shapes[structure.output][1]
    rows = {name: shapes[name][0] for name in structure.attention}
    size = width // heads
    groups = (sum(rows.values()) - width) // (2 * size) if width % heads == 0 else 0
    if not groups or heads % groups:
        sizes = ", ".join(f"{count} rows in {name}" for name, count in rows.items())
        raise BarberError(
            f"model has {heads} query heads, but {sizes}: no whole number of query heads a key-value head"
        )
    each = heads // groups
    starts = _stacked(structure.attention, [heads * size, groups * size, groups * size], shapes)
    query, key, value = structure.attention
    if unit == "query" and each > 1:
        parts = (Slice(query, 0, starts[0], size), Slice(structure.output, 1, 0, size))
        return Units(HEADS, heads, parts, groups=groups, alone=True)
    slices = (
        Slice(query, 0, starts[0], each * size), Slice(key, 0, starts[1], size), Slice(value, 0, starts[2], size),
        Slice(structure.output, 1, 0, each * size),
    )  # fmt: skip
    return Units(HEADS, groups, slices, heads=each)


def _channels(shapes: dict[str, tuple[int, int]], structure: Structure) -> Units:
    width = shapes[structure.down][1]
    starts = _stacked(structure.makers, [width] * len(structure.makers), shapes)
    makers = tuple(Slice(name, 0, start, 1) for name, start in zip(structure.makers, starts, strict=True))
    return Units(CHANNELS, width, (*makers, Slice(structure.down, 1, 0, 1)))


def _stacked(names: Sequence[str], rows: Sequence[int], shapes: dict[str, tuple[int, int]]) -> list[int]:
    """Where each part begins: at 0, or after the parts before it in the same fused Linear."""
    ends = dict.fromkeys(names, 0)
    starts = []
    for name, size in zip(names, rows, strict=True):
        starts.append(ends[name])
        ends[name] += size
    for name, end in ends.items():
        if end != shapes[name][0]:
            raise BarberError(f"model has {shapes[name][0]} rows in {name}, where its configuration says {end}")
    return starts
