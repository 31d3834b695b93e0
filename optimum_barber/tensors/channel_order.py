"""Orders of the input channels of Linears under which N:M masks drop less. Torch, and scipy's linear assignment.

An N:M mask keeps the N largest scores of M consecutive channels. Which channels stand together is free where whatever
makes them can be reordered too. `channel_order` looks for an order under which the dropped scores sum up to little:
it takes one channel out of every group and puts all of them back where they cost least, again and again.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROWS = 4096  # rows at a time whose distances are summed in float32
STILL = 1e-3  # a sweep that gains a smaller share of what is dropped is the last one


def dropped_scores(scores: Tensor, order: Tensor, keep: int, group: int) -> float:
    """Return the sum of the scores that an N:M mask drops where channels stand in an order.

    Args:
        scores: (rows, channels), 0 or more.
        order: (channels,) int64: the channel that stands at each place.
        keep: N, the scores kept of each group of every row.
        group: M, which divides the number of channels.
    """
    total = 0.0
    for rows in scores.split(ROWS):
        grouped = rows[:, order].unflatten(1, (-1, group))
        total += float(grouped.topk(group - keep, dim=2, largest=False).values.sum(dtype=torch.float64))
    return total


def dealt_order(scores: Tensor, group: int) -> Tensor:
    """Return the order that deals channels out like cards: by falling sum of their scores, one to each group in turn.

    Every other round goes backwards through the groups, so that their sums are about the same.
    """
    groups = scores.shape[1] // group
    rounds = scores.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).view(group, groups)
    for index in range(1, group, 2):
        rounds[index] = rounds[index].flip(0)
    return rounds.t().reshape(-1).contiguous()


def channel_order(scores: Tensor, keep: int, group: int, sweeps: int = 20) -> Tensor:
    """Return an order of channels under which N:M drops little of the scores; never more than the order they have.

    Args:
        scores: (rows, channels) float32, 0 or more; of several Linears that read the same channels, one below another.
        keep: N; `group` is M, which divides the number of channels.
        sweeps: over the places of a group, at most.

    Returns:
        (channels,) int64 on the CPU: the channel that stands at each place.
    """
    identity = torch.arange(scores.shape[1], device=scores.device)
    order = dealt_order(scores, group)
    before = dropped_scores(scores, order, keep, group)
    for _ in range(sweeps):
        for place in range(group):
            order = _exchanged(scores, order, place, keep, group)
        after = dropped_scores(scores, order, keep, group)
        if after >= before * (1 - STILL):
            break
        before = after
    better = dropped_scores(scores, order, keep, group) < dropped_scores(scores, identity, keep, group)
    return (order if better else identity).cpu()


def _exchanged(scores: Tensor, order: Tensor, place: int, keep: int, group: int) -> Tensor:
    """Take the channel at one place out of every group, and put all of them back where they cost least.

    With the other scores of a group and row r_1 >= ... >= r_(M-1), adding x drops min(x, r_N) + sum over i > N of r_i.
    The sum is the same for all x, and min(x, r) = (x + r - |x - r|) / 2: the distances |x - r| alone decide.
    """
    grouped = order.view(-1, group)
    others = grouped[:, [index for index in range(group) if index != place]]
    distances = torch.zeros(len(grouped), len(grouped), dtype=torch.float64, device=scores.device)
    for rows in scores.split(ROWS):
        rest = rows[:, others].topk(keep, dim=2).values[:, :, -1]
        distances += torch.cdist(rest.t(), rows[:, grouped[:, place]].t(), p=1)
    _, columns = linear_sum_assignment(distances.cpu().numpy(), maximize=True)
    result = grouped.clone()
    result[:, place] = grouped[torch.from_numpy(columns).to(order.device), place]
    return result.reshape(-1)
