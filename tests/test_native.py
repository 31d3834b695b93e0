"""Kernels give the bits of torch, and their absence changes nothing but time."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimum_barber.tensors import native, sums, swaps

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(autouse=True)
def forget_library():
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.fixture
def without_kernels(monkeypatch):
    def turned_off():
        native._library.cache_clear()
        monkeypatch.setenv(native.SWITCH, "0")

    return turned_off


def rows_of(rows: int, width: int, group: int | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    values = torch.randn(rows, width, generator=generator)
    ranks = values.abs().view(rows, -1, group or width).argsort(-1).argsort(-1)
    keep = (ranks >= (group or width) // 2).view(rows, width)
    gram = x.t() @ x / width
    return values, keep, gram, (values * ~keep) @ gram


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
class TestWithCompiler:
    @pytest.mark.parametrize("group", [None, 4, 8])
    @pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 40), (33, 72)])
    @pytest.mark.parametrize("most", [1, 5, 100])
    def test_exchanges_are_torch_bits(self, without_kernels, rows, width, group, most):
        tensors = rows_of(rows, width, group)
        made = swaps.exchange(*tensors, most, group)
        assert native._library() is not None
        without_kernels()
        assert torch.equal(swaps.exchange(*tensors, most, group), made)
        assert not torch.equal(made, tensors[1]) or rows == 1

    @pytest.mark.parametrize("group", [None, 4])
    def test_equal_costs_fall_to_the_lower_place(self, without_kernels, group):
        values = torch.ones(3, 16)
        keep = torch.tensor([True, False]).repeat(3, 8)
        correlation = torch.where(keep, -1.0, 3.0)
        tensors = values, keep, torch.eye(16), correlation
        made = swaps.exchange(*tensors, 3, group)
        without_kernels()
        assert torch.equal(swaps.exchange(*tensors, 3, group), made)

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_threads_change_nothing(self, threads):
        tensors = rows_of(10, 64, None)
        before = torch.get_num_threads()
        expected = swaps.exchange(*tensors, 50)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(swaps.exchange(*tensors, 50), expected)
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("shape", [(1,), (3, 5), (257, 513)])
    def test_sums_are_torch_bits(self, without_kernels, shape):
        parts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10**seed for seed in range(4)]
        one = _sum(parts)
        without_kernels()
        assert torch.equal(_sum(parts), one)
        exact = torch.stack(parts).double().sum(0).float()
        torch.testing.assert_close(one, exact, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("group", [None, 4])
    def test_rows_that_are_not_finite_stay_as_they_are(self, group):
        values, keep, gram, correlation = rows_of(3, 16, group)
        expected = swaps.exchange(values, keep, gram, correlation, 10, group)
        correlation[1, 5] = torch.nan
        made = swaps.exchange(values, keep, gram, correlation, 10, group)
        assert torch.equal(made[1], keep[1])
        assert torch.equal(made[[0, 2]], expected[[0, 2]])

    def test_arguments_stay_as_they_are(self):
        tensors = rows_of(5, 24, None)
        before = [tensor.clone() for tensor in tensors]
        swaps.exchange(*tensors, 10)
        for tensor, value in zip(tensors, before, strict=True):
            assert torch.equal(tensor, value)

    def test_they_are_compiled_once(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        first = native._compiled(COMPILER)
        written = first.stat().st_mtime_ns
        assert native._compiled(COMPILER) == first
        assert first.stat().st_mtime_ns == written
        assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_other_dtypes_have_no_kernel():
    values, keep, gram, correlation = (tensor.double() for tensor in rows_of(2, 8, None))
    assert native.exchanged(values, keep.bool(), correlation, gram, 3, None) is None
    assert not native.add_to_double(values, values)


def test_a_compiler_that_fails_is_told_and_left(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO, native.logger.name):
        assert native._library() is None
    assert "torch computes instead" in caplog.text
    assert not list(Path(tmp_path / "cache").rglob("*.so"))


def _sum(parts: list[Tensor]) -> Tensor:
    total = sums.Sum()
    for part in parts:
        total.add(part)
    return total.over()
