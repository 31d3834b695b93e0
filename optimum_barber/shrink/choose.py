"""How many heads and channels go, and which."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

from ..base.errors import BarberError
from ..tensors.unit_scores import highest_in_groups
from .settings import ShrinkConfig
from .units import CHANNELS, HEADS, LayerUnits, Units


@dataclass(frozen=True)
class Budget:
    """The number of units that stay in every decoder layer, by kind, and the share of its parameters that goes."""

    kept: dict[str, int]
    share: float


def budget_of(config: ShrinkConfig, layer: nn.Module, units: LayerUnits, linears: Iterable[nn.Linear]) -> Budget:
    """The numbers of units that stay, so that the removed share is as close to the wanted one as units allow.

    Heads go to the nearest whole number (of two that are equally near, the one that removes less), FFN channels make
    up the total. `layer` is one of the decoder layers, which are all alike, `linears` are those of its attention and
    MLP.

    Raises:
        BarberError: a share that would remove all heads or all channels of a layer.
    """
    total = 0
    for linear in linears:
        total += sum(parameter.numel() for parameter in linear.parameters(False))
    head_size, channel_size = units[HEADS].parameters(layer), units[CHANNELS].parameters(layer)
    heads = _head_count(config, units[HEADS])
    before = units[CHANNELS].count
    if config.remove is None:
        channels = _exact(config.remove_channels or 0.0) * before
    else:
        channels = (_exact(config.remove) * total - heads * head_size) / channel_size
    width = _width_of(before - channels, before, config)
    removed = heads * head_size + (before - width) * channel_size
    if not removed:
        raise BarberError(_nothing_removed(config, units, channel_size / total))
    return Budget({HEADS: units[HEADS].count - heads, CHANNELS: width}, removed / total)


def _nothing_removed(config: ShrinkConfig, units: LayerUnits, channel: float) -> str:
    """What to say where shares are too small for one unit; `channel` is the share of a layer that one channel is."""
    if config.remove is not None:
        return f"remove {config.remove:g} removes nothing: one channel is {channel:.2g} of it"
    heads, channels = units[HEADS], units[CHANNELS].count
    each = heads.count // heads.groups
    owner = "every group" if heads.alone else "a layer"
    return (
        f"remove heads {config.remove_heads or 0:g} and remove channels {config.remove_channels or 0:g} remove nothing"
        f": of {each} {heads.name}s of {owner} a share above {0.5 / each:.4g} removes one, of {channels} channels one "
        f"above {0.5 * config.round_to / channels:.4g}"
    )


def _head_count(config: ShrinkConfig, units: Units) -> int:
    """The number of head units that go: whole ones, the same number from each group."""
    share = config.remove_heads
    if share is None:
        share = config.remove or 0.0
    each = units.count // units.groups
    count = math.ceil(_exact(share) * each - Fraction(1, 2))  # the lower one of two that are equally near
    if count >= each:
        owner = "every group of a layer" if units.alone else "a layer"
        text = f"remove {share:g} would take all {each} {units.name}s of {owner}: at most {each - 1} can go"
        if config.remove_heads is None:
            text += ", such as by --remove-heads"
        raise BarberError(text)
    return count * units.groups


def _width_of(wanted: Fraction, before: int, config: ShrinkConfig) -> int:
    """The FFN channels that stay: the multiple of `round_to` nearest to `wanted`, the larger one of two.

    Where the heads alone meet the share, all stay.
    """
    step = config.round_to
    if step > before:
        raise BarberError(f"round-to {step} is larger than the layer: it has {before} FFN channels")
    if wanted >= before:
        return before
    if wanted < Fraction(1, 2):
        raise BarberError(f"remove {_wanted(config):g} would take all {before} FFN channels of a layer")
    return min(max(math.floor(wanted / step + Fraction(1, 2)), 1), before // step) * step


def highest(scores: Tensor, units: Units, count: int) -> list[int]:
    """The `count` units of highest score, the same number from each group; the lower index first among equals."""
    return highest_in_groups(scores, units.groups, count)


def _exact(share: float) -> Fraction:
    """The decimal that was written."""
    return Fraction(str(share))


def _wanted(config: ShrinkConfig) -> float:
    if config.remove is not None:
        return config.remove
    return config.remove_channels or 0.0
