"""Keep masks as tensors: selecting, applying, checking, packing, hashing. True means kept. Torch only."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .patterns import SparsityPattern

# The eight mask values of each possible byte, lowest bit first, as one 64-bit number: unpacking is one look-up a byte.
BYTES = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool().view(torch.int64)

PIECE = 2**22  # weights that are counted at once
SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by bytes


def select_lowest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of each row of (rows, width) scores, in [0, width]; ties fall to the lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(count, dim=1, keepdim=True).values
    return fill_up(scores < cut, scores == cut, torch.full_like(cut, count, dtype=torch.long))


def count_true(mask: Tensor) -> Tensor:
    """True of each row, (rows,) int64; a single long row is counted without a 64-bit copy of it."""
    return mask.count_nonzero()[None] if len(mask) == 1 else mask.count_nonzero(1)


def count_all(masks: Iterable[Tensor]) -> int:
    """The number of True in all masks, read from their device at once."""
    counts = [mask.count_nonzero() for mask in masks]
    return int(torch.stack(counts).sum()) if counts else 0


def fill_up(chosen: Tensor, tied: Tensor, counts: Tensor) -> Tensor:
    """Add the first of the `tied` to the `chosen` until each row has its count; (rows, width) bool.

    Both are overwritten; `counts` is (rows, 1) int64.
    """
    room = counts - count_true(chosen)[:, None]
    if bool((count_true(tied)[:, None] > room).any()):
        for piece in tied.split(max(PIECE // len(tied), 1), dim=1):
            counted = piece.cumsum(1, dtype=torch.int32)
            piece &= counted <= room
            room = room - counted[:, -1:]
    return chosen.logical_or_(tied)


def keep_highest(scores: Tensor, pattern: SparsityPattern, scope: str = "row") -> Tensor:
    """The keep mask, (out, in) bool, that prunes the lowest scores, (out, in), of each comparison group.

    That is floor(ratio * n) a group or, in the first groups, one more; or M - N of every M. The scope that an
    unstructured pattern compares within is "row" or "layer".
    """
    if pattern.semi_structured:
        grouped = scores.reshape(-1, pattern.group)
        pruned = rank_in_group(grouped) < pattern.group - pattern.keep
    else:
        grouped = scores.reshape(1, -1) if scope == "layer" else scores
        count, more = pattern.pruned_of(*grouped.shape)
        pruned = select_lowest(grouped[more:], count)
        if more:
            pruned = torch.cat([select_lowest(grouped[:more], count + 1), pruned])
    return ~pruned.reshape(scores.shape)


def rank_in_group(scores: Tensor) -> Tensor:
    """Stable ascending rank of each score within its row, such as an M-group: (rows, M) int64 in [0, M)."""
    order = scores.argsort(dim=1, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def holds_pattern(keep: Tensor, pattern: SparsityPattern) -> bool:
    """Whether every M consecutive weights of (out, in) `keep` hold exactly N True; True if unstructured."""
    if not pattern.semi_structured:
        return True
    if keep.shape[1] % pattern.group:
        return False
    return bool((keep.reshape(-1, pattern.group).sum(1) == pattern.keep).all())


# A CPU mispredicts every other branch on the bits of a keep mask, which makes `torch.where` and `masked_fill` about ten
# times as slow as the bitwise arithmetic of the next three functions. The results are the same.


def kept_or_zero(values: Tensor, keep: Tensor) -> Tensor:
    """The values where `keep` is True, 0.0 elsewhere; of any floating dtype, (rows, width) as the bool mask."""
    integers = SAME_SIZE[values.element_size()]
    all_or_none = keep.to(integers).neg_()  # all bits set, or none
    return all_or_none.bitwise_and_(values.view(integers)).view(values.dtype)


def infinite_where(costs: Tensor, void: Tensor) -> Tensor:
    """The finite costs, infinite where `void` is True; of any floating dtype, of the shape of the bool mask."""
    integers = SAME_SIZE[costs.element_size()]
    infinity = torch.full((), torch.inf, dtype=costs.dtype, device=costs.device).view(integers)
    return void.to(integers).mul_(infinity).view(costs.dtype).add_(costs)


def signed(values: Tensor, positive: Tensor) -> Tensor:
    """The values where `positive` is True, their opposites elsewhere."""
    return positive.to(values.dtype).mul_(2).sub_(1).mul_(values)


@dataclass(frozen=True)
class PackedMask:
    """A keep mask at one bit a weight.

    Attributes:
        bits: uint8 of ceil(n / 8), the first weight in the lowest bit of the first byte; on the CPU.
        shape: of the mask, (out, in).
    """

    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, keep: Tensor) -> "PackedMask":
        """Pack a bool tensor of any shape."""
        flat = keep.reshape(-1).to("cpu", torch.uint8)
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
        bits = torch.zeros(padded.shape[0], dtype=torch.uint8)
        for bit in range(8):
            bits |= padded[:, bit] << bit
        return cls(bits, tuple(keep.shape))

    def unpack(self) -> Tensor:
        """The bool tensor that was packed, on the device of its bits."""
        keep = BYTES.to(self.bits.device).index_select(0, self.bits.int()).view(torch.bool)
        return keep.reshape(-1)[: self.weights].reshape(self.shape)

    @property
    def weights(self) -> int:
        """How many weights the mask covers."""
        return torch.Size(self.shape).numel()

    @property
    def pruned(self) -> int:
        """How many weights are pruned."""
        return self.weights - int(self.unpack().sum())

    @property
    def sha256(self) -> str:
        """Hash over the shape and the bits, 64 hexadecimal digits."""
        digest = hashlib.sha256(repr(self.shape).encode())
        digest.update(raw_bytes(self.bits))
        return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in its own memory where it is contiguous."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
