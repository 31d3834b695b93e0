"""How a process of ours holds its memory."""

import ctypes
import sys

WEIGHT_SIZED = 4 * 2**20  # bytes; activations of a window are smaller and stay in the heap, where reuse is free
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def return_freed_buffers(bytes_from: int = WEIGHT_SIZED) -> None:
    """Have buffers of this size and above go back to the system when they are freed; glibc only, once a process.

    Left to itself, glibc serves ever larger buffers from its heap, where small long-lived ones, such as packed
    masks, pin what lies beneath them: the resident size then grows with every decoder layer. A program calls
    this at its start, a library does not; `MALLOC_MMAP_THRESHOLD_=4194304` in the environment does the same.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, bytes_from)
