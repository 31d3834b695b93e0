"""Which calibration windows of a refinement measure, which are learned from, and which give the Gram matrices."""

import logging
from collections.abc import Sequence

from torch import Tensor

from ...base.errors import BarberError
from ..rebuilders.ratio import stride_of

logger = logging.getLogger(__name__)
GRAM_WINDOWS = 24  # the Gram matrices of all steps come from at least so many windows, or from all
SEEN = 0.25  # share of the measuring windows that may be learned from too, without a warning
PIECE = 32  # tokens by which a window is known again


def measuring_stride(windows: int) -> int:
    """Every how many windows one measures, where the others are learned from: every eighth, more of fewer than 16."""
    return max(stride_of(windows), 2)


def batches_of(windows: Sequence[int], size: int) -> list[list[int]]:
    """All windows in batches of about this size, each from the whole text and so from all ranks."""
    count = max(round(len(windows) / size), 1)
    return [list(windows[first::count]) for first in range(count)]


def gram_windows(windows: Sequence[int], ranks: int) -> list[int]:
    """Every n-th of the windows, n as large as leaves `GRAM_WINDOWS`, and some of every rank; all if there are few."""
    least = max(GRAM_WINDOWS, 2 * ranks)
    return list(windows[:: max(len(windows) // least, 1)])


def check_windows(tokens: Tensor, ranks: int = 1) -> None:
    """Refuse fewer than 2 windows for each rank; warn where those that measure are learned from too."""
    if len(tokens) < 2:
        raise BarberError("samples 1 is not legal: at least 2, one to learn from and one to measure")
    if len(tokens) < 2 * ranks:  # one of two windows in a row is learned from
        raise BarberError(f"samples {len(tokens)} is not legal: at least {2 * ranks}, 2 for each of {ranks} ranks")
    share = seen_share(tokens)
    if share > SEEN:
        logger.warning("%.0f %% of what measures is learned from too: give fewer windows, or more text", 100 * share)


def seen_share(windows: Tensor) -> float:
    """Share of the windows that measure, (samples, length) int64 in all, whose middle stands in one that is learned."""
    length = windows.shape[1]
    piece, stride = min(PIECE, length), measuring_stride(len(windows))
    start = (length - piece) // 2
    learned: set[tuple[int, ...]] = set()
    for index, window in enumerate(windows):
        if index % stride:
            learned.update(map(tuple, window.unfold(0, piece, 1).tolist()))
    middles = windows[::stride, start : start + piece].tolist()
    return sum(tuple(middle) in learned for middle in middles) / len(middles)
