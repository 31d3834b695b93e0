"""Importance of heads and FFN channels from weights and input statistics (LLM-BIP, arXiv 2412.06419). Torch only."""

from collections.abc import Sequence

import torch
from torch import Tensor


def input_importance(weight: Tensor, output_importance: Tensor) -> Tensor:
    """|W|^T v, (in,): what the importance v >= 0 of a Linear's outputs, (out,), makes of its inputs."""
    return weight.abs().t() @ output_importance


def mlp_input_importance(
    makers: Sequence[Tensor], down: Tensor, output_importance: Tensor, gain: Tensor | None = None
) -> Tensor:
    """What the importance v of a layer's outputs makes of what enters its MLP beside the residual (inside of Eq. 8).

    v + |gain| * sum over makers of |W|^T (|W_down|^T v), with vectors alone: never a (hidden, hidden) product.

    Args:
        makers: W_up, and W_gate where the MLP has one, (channels, hidden) each.
        down: W_down, (hidden, channels).
        output_importance: v >= 0, (hidden,), as the result.
        gain: of the norm in front of the MLP, (hidden,); None for 1, as the paper has it.
    """
    channels = input_importance(down, output_importance)
    inner = torch.stack([input_importance(weight, channels) for weight in makers]).sum(0)
    if gain is not None:
        inner = gain.abs() * inner
    return output_importance + inner


def unit_sums(values: Tensor, axis: int, start: int, width: int, count: int) -> Tensor:
    """Sums over the units of one Linear, (count,): of `width` rows (axis 0) or columns (axis 1) from start + u * width.

    The values are one per weight, (out, in), or per row or column, (n,) with axis 0.
    """
    units = values.narrow(axis, start, width * count).unflatten(axis, (count, width))
    return units.movedim(axis, 0).flatten(1).sum(1)


def error_matrix(weight: Tensor, gram: Tensor, width: int) -> Tensor:
    """K, with which the block's error is exact: E = sum of K_uv over all pairs of units u, v that go.

    A unit's output enters the block's through its columns of the Linear that reads it, so that taking units away
    changes the block's output by W_R x_R, and E = sum over tokens of ||W_R x_R||² = sum over i, j in R of
    (WᵀW)_ij G_ij. K sums this over the `width` columns of each pair of units.

    Args:
        weight: W of the reader, (out, units * width).
        gram: G = sum over tokens of x xᵀ of its input, (units * width, units * width).

    Returns:
        (units, units) float64, symmetric, positive semidefinite.
    """
    pairs = (weight.t() @ weight) * gram
    count = len(pairs) // width
    return pairs.reshape(count, width, count, width).sum((1, 3)).double()


def exchange_units(matrix: Tensor, kept: Sequence[int], groups: int = 1, shortlist: int = 256) -> list[int]:
    """Kept units after the exchanges that lower E most, one after the other, until none of the shortlist lowers it.

    With R the units that go and c = K 1_R, half the derivative of E that |W ∂E/∂W| sums up to over a unit's columns,
    taking u out of R and putting v in changes E by K_uu - 2 c_u + K_vv + 2 c_v - 2 K_uv. As many units are returned as
    `kept` has, ascending; E is never higher than at the start.

    Args:
        matrix: K, (units, units).
        groups: an exchange stays within one of so many equal groups of units.
        shortlist: the most promising units of either side that are paired with each other.
    """
    count = len(matrix)
    out = torch.ones(count, dtype=torch.bool, device=matrix.device)
    out[torch.tensor(kept, dtype=torch.long, device=out.device)] = False
    slope, own = matrix[:, out].sum(1), matrix.diagonal()
    group = torch.arange(count, device=matrix.device) // (count // groups)
    for _ in range(count):
        back, gone = own - 2 * slope, own + 2 * slope
        u = _lowest_indices(back, out, shortlist)
        v = _lowest_indices(gone, ~out, shortlist)
        change = back[u][:, None] + gone[v][None, :] - 2 * matrix[u][:, v]
        change = change.masked_fill(group[u][:, None] != group[v][None, :], torch.inf)
        if not change.numel() or change.min() >= -1e-9 * own.sum():
            break
        best = int(change.argmin())
        returns, leaves = u[best // len(v)], v[best % len(v)]
        out[returns], out[leaves] = False, True
        slope += matrix[:, leaves] - matrix[:, returns]
    return (~out).nonzero()[:, 0].tolist()


def _lowest_indices(values: Tensor, among: Tensor, count: int) -> Tensor:
    indices = among.nonzero()[:, 0]
    return indices[values[indices].argsort(stable=True)[:count]]


def highest_in_groups(scores: Tensor, groups: int, count: int) -> list[int]:
    """The `count` units of highest score, the same number from each group; the lower index first among equals."""
    by_group = scores.double().cpu().unflatten(0, (groups, -1))
    order = by_group.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    kept: list[int] = []
    for index, row in enumerate(order.tolist()):
        kept += [index * by_group.shape[1] + unit for unit in row]
    return sorted(kept)
