"""Masking by bitwise arithmetic. Torch only.

A CPU mispredicts every other branch on the bits of a keep mask, which makes `torch.where` and `masked_fill` about ten
times as slow as what is here. The results are the same.
"""

from typing import Any

import torch
from torch import Tensor

SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by bytes


def kept_or_zero(values: Tensor, keep: Tensor) -> Tensor:
    """The values where `keep` is True, 0.0 elsewhere; of any floating dtype, (rows, width) as the bool mask."""
    integers = SAME_SIZE[values.element_size()]
    all_or_none = keep.to(integers).neg_()  # all bits set, or none
    return all_or_none.bitwise_and_(values.view(integers)).view(values.dtype)


def infinite_where(costs: Tensor, void: Tensor) -> Tensor:
    """The finite costs, infinite where `void` is True; of any floating dtype, of the shape of the bool mask."""
    integers = SAME_SIZE[costs.element_size()]
    infinity = torch.tensor(torch.inf, dtype=costs.dtype, device=costs.device).view(integers)
    return void.to(integers).mul_(infinity).view(costs.dtype).add_(costs)


def signed(values: Tensor, positive: Tensor) -> Tensor:
    """The values where `positive` is True, their opposites elsewhere."""
    return positive.to(values.dtype).mul_(2).sub_(1).mul_(values)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in its own memory where it is contiguous."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
