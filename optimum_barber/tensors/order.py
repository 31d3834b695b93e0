"""Order statistics of long rows: numpy on the CPU, where torch is slower or carries 64-bit positions along."""

import numpy as np
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
    """The `count` largest (descending) or smallest (ascending) candidates of a row, (count,); all are (width,)."""
    if row.device.type != "cpu":
        return row[candidates].topk(count, largest=largest).values
    values = row.numpy()[candidates.numpy()]
    cut = len(values) - count if largest else count
    if 0 < cut < len(values):
        values.partition(cut)
    if largest:
        return torch.from_numpy(np.sort(values[cut:])).flip(0)
    return torch.from_numpy(np.sort(values[:cut]))


def lowest_column(values: Tensor) -> Tensor:
    """Where each row of a (rows, width) float tensor is lowest, (rows,) int64; ties fall to the lower index."""
    if values.device.type != "cpu":
        return values.argmin(dim=1)
    return torch.from_numpy(values.numpy().argmin(axis=1))
