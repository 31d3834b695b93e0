"""Dynamic sparse no training: cycles of growing and pruning by expected errors (DSnoT, arXiv 2310.08915). Torch only.

A row's expected error is e = -sum over pruned j of w_j mu_j, mu the mean of the input. While e keeps its sign, and
for a number of cycles at most, the pruned weight that lowers |e| most, in units of its input's variance, is grown, and
of the kept weights whose removal lowers |e| too the one with the smallest Wanda score |w_i| ||x_i|| is pruned.
"""

import torch
from torch import Tensor


def grow_and_prune(
    weight: Tensor, keep: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, cycles: int, group: int | None = None
) -> Tensor:
    """The keep mask after the cycles. The order of growing and of pruning is fixed, so all cycles are done at once.

    Args:
        weight: w, (rows, width) float: what a weight is worth where it is kept.
        mean: mu of each input channel, (width,), as their `variance` >= 0 and `norm` ||x||.
        cycles: most exchanges a row.
        group: M of an N:M pattern: one exchange in each M-group at most, both members inside; None for none.

    Returns:
        (rows, width) bool, every row (every M-group) with as many kept as before.
    """
    pull = weight * mean  # what a weight adds to e where it grows, and takes from e where it goes
    error = -(pull * ~keep).sum(1, keepdim=True)
    pull = pull * error.sign()
    growing = torch.where(~keep & (pull < 0), -pull / variance.clamp(min=torch.finfo(variance.dtype).tiny), -torch.inf)
    pruning = torch.where(keep & (pull > 0), -weight.abs() * norm, -torch.inf)
    grow, prune, legal = _ranked(growing, pruning, cycles) if group is None else _in_groups(growing, pruning, group)
    relief = (pull.gather(1, prune) - pull.gather(1, grow)).masked_fill(~legal, 0.0)
    done = legal & (relief.cumsum(1) - relief < error.abs())
    done &= done.cumsum(1) <= cycles
    return keep ^ _marks(keep, grow, done) ^ _marks(keep, prune, done)


def _ranked(growing: Tensor, pruning: Tensor, cycles: int) -> tuple[Tensor, Tensor, Tensor]:
    count = min(cycles, growing.shape[1])
    grow, prune = growing.topk(count, dim=1), pruning.topk(count, dim=1)
    return grow.indices, prune.indices, (grow.values > -torch.inf) & (prune.values > -torch.inf)


def _in_groups(growing: Tensor, pruning: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = growing.shape  # the best pair of each M-group, the groups in the order of what they grow
    first = torch.arange(0, width, group, device=growing.device)
    grow, prune = growing.view(rows, -1, group).max(2), pruning.view(rows, -1, group).max(2)
    legal = (grow.values > -torch.inf) & (prune.values > -torch.inf)
    order = grow.values.masked_fill(~legal, -torch.inf).argsort(dim=1, descending=True, stable=True)
    columns = (first + grow.indices, first + prune.indices, legal)
    return tuple(column.gather(1, order) for column in columns)  # type: ignore[return-value]


def _marks(keep: Tensor, columns: Tensor, done: Tensor) -> Tensor:
    return torch.zeros_like(keep).scatter_(1, columns, done)
