"""Order statistics of one long row: numpy on the CPU, where torch would carry 64-bit positions beside the values."""

import torch
from torch import Tensor


def kth_smallest(row: Tensor, k: int) -> Tensor:
    """The k-th smallest value, k from 1, of a (width,) float tensor; a scalar tensor."""
    if row.device.type != "cpu":
        return row.kthvalue(k).values
    values = row.numpy().copy()
    values.partition(k - 1)
    return torch.tensor(values[k - 1], dtype=row.dtype)


def extremes(row: Tensor, candidates: Tensor, count: int, largest: bool) -> Tensor:
    """The `count` largest (descending) or smallest (ascending) of the candidates of a row, (count,).

    Args:
        row: (width,) float.
        candidates: (width,) bool, at least `count` True.
        count: how many.
        largest: which end.
    """
    if row.device.type != "cpu":
        return row[candidates].topk(count, largest=largest).values
    values = row.numpy()[candidates.numpy()]
    cut = len(values) - count if largest else count
    if 0 < cut < len(values):
        values.partition(cut)
    ranked = values[cut:].copy() if largest else values[:cut].copy()
    ranked.sort()
    return torch.from_numpy(ranked).flip(0) if largest else torch.from_numpy(ranked)
