"""Masking by bits, against torch's own functions, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_barber.tensors.masks import infinite_where, kept_or_zero, signed

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(seed, dtype):
    """Values with zeros of both signs among them, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, 33, generator=generator).to(dtype)
    values[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    return values, torch.rand(7, 33, generator=generator) < 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_the_bits_are_those_of_where(dtype, seed):
    values, mask = drawn(seed, dtype)
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32 if dtype.itemsize == 4 else torch.int64
    assert torch.equal(kept_or_zero(values, mask).view(integers), torch.where(mask, values, 0.0).view(integers))
    assert torch.equal(infinite_where(values, mask), values.masked_fill(mask, torch.inf))
    assert torch.equal(signed(values, mask), torch.where(mask, values, -values))


def test_what_is_pruned_becomes_zero_whatever_it_was():
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, -1.0]])
    assert kept_or_zero(values, torch.zeros(1, 4, dtype=torch.bool)).view(torch.int32).eq(0).all()
    assert torch.equal(kept_or_zero(values[:, 1:], torch.ones(1, 3, dtype=torch.bool)), values[:, 1:])


def test_neither_the_values_nor_the_mask_are_changed_and_views_do():
    values, mask = drawn(0, torch.float32)
    before = values.clone(), mask.clone()
    assert torch.equal(kept_or_zero(values.t(), mask.t()), torch.where(mask, values, 0.0).t())
    infinite_where(values, mask), signed(values, mask)
    assert torch.equal(values, before[0]) and torch.equal(mask, before[1])
