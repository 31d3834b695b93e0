"""How many heads and channels go, and which."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

from ..base.errors import BarberError
from .settings import ShrinkConfig
from .units import CHANNELS, HEADS, LayerUnits, Units


@dataclass(frozen=True)
class Budget:
    """What stays in every decoder layer.

    Attributes:
        kept: units that stay, by kind.
        share: of the parameters of attention and MLP, what goes.
    """

    kept: dict[str, int]
    share: float


def budget_of(config: ShrinkConfig, layer: nn.Module, units: LayerUnits, linears: Iterable[nn.Linear]) -> Budget:
    """How many units of each kind stay, so that the share asked for is met as closely as the units allow.

    Heads go to the nearest whole number (of two that are equally near, the one that removes less), FFN channels make
    up the total.

    Args:
        config: the shares.
        layer: one decoder layer; all are alike.
        units: its heads and channels.
        linears: of its attention and MLP.

    Raises:
        BarberError: a share that would remove all heads or all channels of a layer.
    """
    total = sum(p.numel() for linear in linears for p in linear.parameters(False))
    each = {kind: unit.parameters(layer) for kind, unit in units.items()}
    heads = head_count(config, units[HEADS])
    before = units[CHANNELS].count
    if config.remove is None:
        gone = exact(config.remove_channels or 0.0) * before
    else:
        gone = (exact(config.remove) * total - heads * each[HEADS]) / each[CHANNELS]
    width = width_of(before - gone, before, config)
    kept = {HEADS: units[HEADS].count - heads, CHANNELS: width}
    removed = sum((units[kind].count - kept[kind]) * each[kind] for kind in kept)
    if not removed:
        raise BarberError(
            f"remove {_asked(config):g} removes nothing: one channel is {each[CHANNELS] / total:.2g} of it"
        )
    return Budget(kept, removed / total)


def exact(share: float) -> Fraction:
    """The decimal that was written."""
    return Fraction(str(share))


def nearest(value: Fraction) -> int:
    """The nearest whole number; the lower one of two."""
    return math.ceil(value - Fraction(1, 2))


def head_count(config: ShrinkConfig, units: Units) -> int:
    """How many head units go: whole ones, the same number from each group.

    Raises:
        BarberError: all would go.
    """
    share = config.remove if config.remove_heads is None else config.remove_heads
    each = units.count // units.groups
    count = nearest(exact(share or 0.0) * each)
    if count >= each:
        what = f"{units.name}s{' of every group' if units.alone else ''}"
        raise BarberError(
            f"remove {share:g} would take all {each} {what} of a layer: at most {each - 1} can go"
            + (", such as by --remove-heads" if config.remove_heads is None else "")
        )
    return count * units.groups


def width_of(wanted: Fraction, before: int, config: ShrinkConfig) -> int:
    """The FFN channels that stay: the multiple of `round_to` nearest to `wanted`, the larger one of two.

    Where the heads alone meet the share, all stay.

    Raises:
        BarberError: none would stay, or `round_to` is more than there are.
    """
    step = config.round_to
    if step > before:
        raise BarberError(f"round-to {step} is larger than the layer: it has {before} FFN channels")
    if wanted >= before:
        return before
    if wanted < Fraction(1, 2):
        raise BarberError(f"remove {_asked(config):g} would take all {before} FFN channels of a layer")
    return min(max(math.floor(wanted / step + Fraction(1, 2)), 1), before // step) * step


def highest(scores: Tensor, units: Units, count: int) -> list[int]:
    """The `count` units of highest score, the same number from each group; the lower index first among equals."""
    groups = scores.double().cpu().unflatten(0, (units.groups, -1))
    order = groups.argsort(dim=1, descending=True, stable=True)[:, : count // units.groups]
    starts = [index * (units.count // units.groups) for index in range(units.groups)]
    return sorted(start + int(unit) for start, row in zip(starts, order.tolist(), strict=True) for unit in row)


def _asked(config: ShrinkConfig) -> float:
    return config.remove if config.remove is not None else config.remove_channels or 0.0
