"""Gram matrices summed in strips against loops."""

import pytest
import torch

from optimum_barber import gram as module
from optimum_barber.gram import add_gram, entries, mirror


@pytest.mark.parametrize("width", [1, 3, 4, 7])
def test_sums_in_strips_are_the_sums_of_outer_products(monkeypatch, width):
    monkeypatch.setattr(module, "STRIP", 3)
    samples = [torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    total = None
    for sample in samples:
        total = add_gram(total, sample)
    found = mirror(total)
    for i in range(width):
        for j in range(width):
            expected = sum(float(row[i]) * float(row[j]) for sample in samples for row in sample)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(mirror(found.clone()), found)


@pytest.mark.parametrize(("width", "expected"), [(2, 4), (3, 9), (4, 3 * 4 + 1), (7, 3 * 7 + 3 * 4 + 1)])
def test_the_entries_that_are_computed_are_counted(monkeypatch, width, expected):
    monkeypatch.setattr(module, "STRIP", 3)
    assert entries(width) == expected
