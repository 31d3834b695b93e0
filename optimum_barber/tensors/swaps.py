"""Exchanges of one kept against one pruned weight of a row, by the Gram matrix of the row's input. Torch only.

SparseSwaps (arXiv 2512.10922). A row of weights v under the keep mask m, with input x and
target t, has the error e = sum over tokens of (t - (v * m) x)^2. With G = sum of x x^T and the correlation
c = sum of (t - (v * m) x) x, pruning the kept i and growing the pruned j changes it by exactly

    2 v_i c_i + v_i^2 G_ii  -  2 v_j c_j + v_j^2 G_jj  -  2 v_i v_j G_ij,

and c then by v_i G_i - v_j G_j. Rows are independent. One exchange costs O(rows * width).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import native
from .swap_steps import FreeRows, GroupRows, Rows, turn_of

Begin = Callable[[Tensor, Tensor, Tensor], Rows]  # takes the values, keep masks and slopes of some rows

TOGETHER = 2**18  # weights worked on at once by each thread of the CPU: what an exchange touches stays near
TOGETHER_ON_DEVICE = 2**23  # elsewhere: few steps, each of them large
LEG = 10  # steps after which rows that have nothing more to gain are left aside
LONGER = 2  # times the leg before is each further one within groups, where to begin one costs some steps


def exchange(
    values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, most: int | None, group: int | None = None
) -> Tensor:
    """The keep mask after up to `most` improving exchanges in each row.

    In turn, the pruned weight that gains most alone is grown and the kept one that suits it best goes, or the kept
    one that costs least alone goes and the pruned one that suits it best is grown; inside M-groups the best pair is
    taken.

    Args:
        values: v, (rows, width) float: what a weight is worth where it is kept.
        keep: m, (rows, width) bool.
        gram: G, (width, width), of the dtype of `values`.
        correlation: c, (rows, width), of the residual at m with the input.
        most: steps a row, of one exchange at most; None for as many as there are, until no pair of any row improves.
        group: M of an N:M pattern, whose exchanges stay within M consecutive weights; None for none.

    Returns:
        (rows, width) bool, every row (every M-group) with as many kept as before.
    """
    if group is None:
        return _exchanged(values, keep, correlation, gram, most, None)
    values, keep, correlation, gram = (_by_place(rows, group) for rows in (values, keep, correlation, gram))
    slopes = turn_of(values, keep).mul_(correlation)
    return _by_group(_exchanged(values, keep, slopes, gram, most, group), group)


def _by_place(rows: Tensor, group: int) -> Tensor:
    # by the place in the M-group, then by the group: pairs are formed along long rows
    return rows.view(len(rows), -1, group).transpose(1, 2).reshape(rows.shape)


def _by_group(rows: Tensor, group: int) -> Tensor:
    return rows.view(len(rows), group, -1).transpose(1, 2).reshape(rows.shape)


def _exchanged(
    values: Tensor, keep: Tensor, slopes: Tensor, gram: Tensor, most: int | None, group: int | None
) -> Tensor:
    """The keep mask, by the kernel where there is one; `slopes` are c, or turn * c within groups."""
    made = native.exchanged(values, keep, slopes, gram, most, group)
    if made is not None:
        return made
    begin: Begin = partial(FreeRows, gram=gram, thorough=most is None)
    if group is not None:
        begin = partial(GroupRows, gram=gram, group=group)
    return _leg_by_leg(values, keep, slopes, most, begin, group)


def _leg_by_leg(
    values: Tensor, keep: Tensor, slopes: Tensor, most: int | None, begin: Begin, group: int | None
) -> Tensor:
    """The keep mask, leg by leg; the rows are independent, so it does not matter which are worked on together.

    `slopes`, (rows, width), carries between the legs what all exchanges so far have changed: c, or turn * c.
    """
    keep, slopes = keep.clone(), slopes.clone()
    at_once = TOGETHER * torch.get_num_threads() if values.device.type == "cpu" else TOGETHER_ON_DEVICE
    together = at_once // max((group or 4) // 4, 1)
    going, left, steps = torch.arange(len(keep), device=keep.device), most, LEG
    while len(going) and left != 0:
        if left is not None:
            steps = min(steps, left)
            left -= steps
        improvable = []
        for rows in going.split(max(together // values.shape[1], 1)):
            v, m, s = (tensor.index_select(0, rows) for tensor in (values, keep, slopes))
            improvable.append(rows[begin(v, m, s).run(steps)])
            keep.index_copy_(0, rows, m)
            slopes.index_copy_(0, rows, s)
        going = torch.cat(improvable)
        if group is not None:
            steps *= LONGER
    return keep
