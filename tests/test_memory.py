"""Memory that goes back to the system, where the C library is glibc."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from optimum_barber.memory import give_back

PAGE_RICH = 2**15  # bytes of a small buffer: in the heap, over several pages
glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc"
)


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@glibc
def test_free_pages_between_buffers_go_back_where_they_are_many() -> None:
    buffers = [torch.ones(PAGE_RICH // 4) for _ in range(2000)]
    buffers = buffers[::8]  # what is left pins the heap's top
    before = anonymous()
    give_back(2**40)
    assert anonymous() > before - 2**22
    give_back(2**20)
    assert anonymous() < before - 2**25
    assert all(float(buffer.sum()) == PAGE_RICH // 4 for buffer in buffers)
