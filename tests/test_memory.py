"""Memory that goes back to the system, where the C library is glibc."""

import ctypes
import gc
import re
import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base import memory
from optimum_barber.base.memory import Heap, resident
from optimum_barber.models.loading import resolve_model

from .conftest import tiny_model, tiny_windows
from .test_experts import mixtral

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


@glibc
def test_free_buffers_are_counted_only_where_the_process_has_grown(monkeypatch) -> None:
    levels, counted = iter([300, 300, 300, 420, 400, 400, 360, 480, 480]), []
    monkeypatch.setattr(memory, "resident", lambda: next(levels))
    monkeypatch.setattr(memory, "_beside_buffers", lambda: counted.append(None) or 0)
    heap = Heap()
    for times in (1, 1, 2, 2, 2, 3):  # 300 and again, no growth, 420 and then 400, 400, 360, and 480: 120 more
        heap.give_back(100)
        assert len(counted) == times


@pytest.mark.parametrize("make", [tiny_model, mixtral], ids=["dense", "experts"])
def test_a_layer_has_left_the_memory_when_the_next_one_begins(tmp_path, make):
    make().save_pretrained(tmp_path / "model")
    storages = {}

    def producer(linear):
        layer = int(re.search(r"\.(\d+)\.", linear.name)[1])
        storages.setdefault(layer, []).append(StorageWeakRef(linear.weight.untyped_storage()))
        assert all(storage.expired() for storage in storages.get(layer - 1, ()))
        return linear.weight.abs() > linear.weight.abs().median(1, keepdim=True).values

    sparsifier = BarberSparsifier(None, None, resolve_model(str(tmp_path / "model")), stream="always")
    config = BarberConfig(producer=producer, sparsity=0.5, rebuild="swaps")
    gc.disable()
    try:
        sparsifier.sparsify(config, tiny_windows(), tmp_path / "out", quiet=True)
    finally:
        gc.enable()
    assert len(storages) > 1
