"""Importance of heads and FFN channels from weights and input statistics (METHODS: LLM-BIP). Torch only."""

from collections.abc import Sequence

import torch
from torch import Tensor


def carried(weight: Tensor, behind: Tensor) -> Tensor:
    """|W|^T v: what the importance v of a Linear's outputs makes of its inputs.

    Args:
        weight: W, (out, in).
        behind: v >= 0, (out,).

    Returns:
        (in,), >= 0.
    """
    return weight.abs().t() @ behind


def through_mlp(makers: Sequence[Tensor], down: Tensor, behind: Tensor, gain: Tensor | None = None) -> Tensor:
    """What the importance v of a layer's outputs makes of what enters its MLP beside the residual (inside of Eq. 8).

    v + |gain| * sum over makers of |W|^T (|W_down|^T v), with vectors alone: never a (hidden, hidden) product.

    Args:
        makers: W_up, and W_gate where the MLP has one, (channels, hidden) each.
        down: W_down, (hidden, channels).
        behind: v >= 0, (hidden,).
        gain: of the norm in front of the MLP, (hidden,); None for 1, as the paper has it.

    Returns:
        (hidden,), >= 0.
    """
    channels = carried(down, behind)
    inner = torch.stack([carried(weight, channels) for weight in makers]).sum(0)
    return behind + (inner if gain is None else gain.abs() * inner)


def influence(input_abs: Tensor, weight: Tensor, behind: Tensor) -> Tensor:
    """The bound on the change of the layer's output when an input channel of a Linear goes (Eq. 8 and 9).

    s_j = (sum over tokens of |x_tj|) * (|W|^T v)_j; v = 1 for an FFN's down projection (Eq. 9), and what
    `through_mlp` makes of 1 for an attention's output projection (Eq. 8).

    Args:
        input_abs: sum over tokens of |x|, (in,).
        weight: W of the Linear that reads the channels, (out, in).
        behind: v, (out,).

    Returns:
        (in,), >= 0.
    """
    return input_abs * carried(weight, behind)


def summed(values: Tensor, axis: int, start: int, width: int, count: int) -> Tensor:
    """Sums over the units of one Linear: unit u is `width` rows (axis 0) or columns (axis 1) from start + u * width.

    Args:
        values: a value per weight, (out, in), or per row or column, (n,) with axis 0.

    Returns:
        (count,).
    """
    units = values.narrow(axis, start, width * count).unflatten(axis, (count, width))
    return units.movedim(axis, 0).flatten(1).sum(1)
