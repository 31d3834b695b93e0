"""Memory that goes back to the system, where the C library is glibc."""

import ctypes
import sys

import pytest
import torch

from optimum_barber.base.memory import Heap, resident

PAGE_RICH = 2**15  # bytes of a small buffer: in the heap, over several pages
glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc"
)


@glibc
def test_free_pages_between_buffers_go_back_where_they_are_many() -> None:
    buffers = [torch.ones(PAGE_RICH // 4) for _ in range(2000)]
    buffers = buffers[::8]  # what is left pins the heap's top
    heap, before = Heap(), resident()
    heap.give_back(2**40)
    assert resident() > before - 2**22
    heap.give_back(2**20)
    assert resident() < before - 2**25
    settled = heap.settled
    assert settled > 0
    heap.give_back(2**20)
    assert heap.settled == pytest.approx(settled, abs=2**20), "nothing has gathered since"
    assert all(float(buffer.sum()) == PAGE_RICH // 4 for buffer in buffers)
