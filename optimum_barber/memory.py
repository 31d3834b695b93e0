"""How a process of ours holds its memory: freed buffers go back to the system, where glibc is its C library."""

import ctypes
import gc
import sys
from typing import Any

WEIGHT_SIZED = 4 * 2**20  # bytes; activations of a window are smaller and stay in the heap, where reuse is free
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def return_freed_buffers(bytes_from: int = WEIGHT_SIZED) -> None:
    """Have buffers of this size and above go back to the system as soon as they are freed, from now on.

    Left to itself, glibc serves ever larger buffers from its heap, where small long-lived ones, such as packed
    masks, pin what lies beneath them: the resident size then grows with every decoder layer.
    `MALLOC_MMAP_THRESHOLD_=4194304` in the environment does the same.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, bytes_from)


def trim() -> None:
    """Give back what is free now, garbage too."""
    gc.collect()
    give_back()


def give_back() -> None:
    """Give back what is free in the heap: small buffers of one pass, which those of the next may not fit into."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
