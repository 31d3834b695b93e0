"""How a process of ours holds its memory: freed buffers go back to the system, where glibc is its C library."""

import ctypes
import gc
import sys
from typing import Any

WEIGHT_SIZED = 4 * 2**20  # bytes; activations of a window are smaller and stay in the heap, where reuse is free
HEAP_TOP = 16 * 2**20  # bytes; activations come and go there, and pages that went back would be faulted in every time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
WORTH_TRIMMING = 256 * 2**20  # bytes; pages that go back must be had again, which costs time


class _Mallinfo(ctypes.Structure):
    """What mallinfo2(3) returns: the heap's size and what of it is free, among others."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def return_freed_buffers(bytes_from: int = WEIGHT_SIZED) -> None:
    """Have buffers of this size and above go back to the system as soon as they are freed, from now on.

    Left to itself, glibc serves ever larger buffers from its heap, where small long-lived ones, such as packed
    masks, pin what lies beneath them: the resident size then grows with every decoder layer. What is free at the heap's
    end stays there for reuse, up to `HEAP_TOP`. `MALLOC_MMAP_THRESHOLD_=4194304` and `MALLOC_TRIM_THRESHOLD_=16777216`
    in the environment do the same.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, bytes_from)
        mallopt(M_TRIM_THRESHOLD, HEAP_TOP)


def trim() -> None:
    """Give back what is free now, garbage too."""
    gc.collect()
    give_back()


def give_back(from_bytes: int = 0) -> None:
    """Give back what is free in the heap: small buffers of one pass, which those of the next may not fit into.

    Args:
        from_bytes: leave it as it is where less is free.
    """
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None and _free_in_heap() >= from_bytes:
        malloc_trim(0)


def _free_in_heap() -> int:
    """Bytes that are free between buffers in use; more than any bound where the C library does not tell."""
    mallinfo = getattr(_libc(), "mallinfo2", None)
    if mallinfo is None:
        return sys.maxsize
    mallinfo.restype = _Mallinfo
    return int(mallinfo().fordblks)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
