"""Exchanges by the Gram matrix, against row errors computed in full for every possible exchange."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_barber.tensors.swaps import exchange


def case(seed, rows=3, width=12, group=None, tokens=9):
    """Inputs, targets, values and a keep mask in float64; the targets are those of other weights than the values."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    targets = inputs @ (values + 0.1 * torch.randn(rows, width, generator=generator, dtype=torch.float64)).t()
    scores = torch.rand(rows, width, generator=generator)
    if group is None:
        return inputs, targets, values, scores < 0.5
    ranks = scores.view(rows, -1, group).argsort(-1).argsort(-1)
    return inputs, targets, values, (ranks < group // 2).view(rows, width)


def row_error(inputs, target, values, keep):
    """sum over tokens of (t - (v * m) x)^2, one row, in plain loops."""
    total = 0.0
    for x, t in zip(inputs.tolist(), target.tolist(), strict=True):
        total += (t - sum(v * f for v, f, k in zip(values.tolist(), x, keep.tolist(), strict=True) if k)) ** 2
    return total


def run(inputs, targets, values, keep, most, group=None):
    residual = targets - inputs @ (values * keep).t()
    return exchange(values, keep, inputs.t() @ inputs, residual.t() @ inputs, most, group)


def exchanges_of(keep, group):
    """Every legal (kept, pruned) pair of a row."""
    kept, pruned = keep.nonzero().flatten().tolist(), (~keep).nonzero().flatten().tolist()
    return [(i, j) for i, j in itertools.product(kept, pruned) if group is None or i // group == j // group]


@pytest.mark.parametrize(("group", "width"), [(None, 12), (4, 12), (4, 16), (2, 12)])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_every_accepted_exchange_changes_the_row_error_as_the_formula_says(group, width, seed):
    inputs, targets, values, keep = case(seed, width=width, group=group)
    after = run(inputs, targets, values, keep, 1, group)
    gram = inputs.t() @ inputs
    for r in range(len(values)):
        if torch.equal(after[r], keep[r]):
            continue
        v = values[r]
        c = (targets[:, r] - inputs @ (v * keep[r])) @ inputs
        (i,), (j,) = (keep[r] & ~after[r]).nonzero().tolist(), (after[r] & ~keep[r]).nonzero().tolist()
        i, j = i[0], j[0]
        predicted = 2 * v[i] * c[i] + v[i] ** 2 * gram[i, i] - 2 * v[j] * c[j] + v[j] ** 2 * gram[j, j]
        predicted -= 2 * v[i] * v[j] * gram[i, j]
        change = row_error(inputs, targets[:, r], v, after[r]) - row_error(inputs, targets[:, r], v, keep[r])
        assert change == pytest.approx(float(predicted), rel=1e-6, abs=1e-9)
        assert change < 0


@pytest.mark.parametrize(("group", "width"), [(None, 12), (4, 12), (4, 16), (2, 12)])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_run_to_the_end_leaves_no_exchange_that_improves(group, width, seed):
    inputs, targets, values, keep = case(seed, width=width, group=group)
    after = run(inputs, targets, values, keep, None, group)
    for r in range(len(values)):
        reached = row_error(inputs, targets[:, r], values[r], after[r])
        assert reached <= row_error(inputs, targets[:, r], values[r], keep[r]) * (1 + 1e-12)
        for i, j in exchanges_of(after[r], group):
            other = after[r].clone()
            other[i], other[j] = False, True
            assert row_error(inputs, targets[:, r], values[r], other) >= reached * (1 - 1e-9) - 1e-9


def test_the_first_exchange_inside_groups_is_the_best_there_is():
    inputs, targets, values, keep = case(5, group=4)
    after = run(inputs, targets, values, keep, 1, 4)
    for r in range(len(values)):
        reached = row_error(inputs, targets[:, r], values[r], after[r])
        for i, j in exchanges_of(keep[r], 4):
            other = keep[r].clone()
            other[i], other[j] = False, True
            assert row_error(inputs, targets[:, r], values[r], other) >= reached * (1 - 1e-9)


@given(seed=st.integers(0, 2**31), most=st.sampled_from([0, 1, 3, None]), group=st.sampled_from([None, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_counts_never_change(seed, most, group):
    inputs, targets, values, keep = case(seed, rows=4, group=group)
    after = run(inputs, targets, values, keep, most, group)
    shape = (4, -1) if group is None else (4, 12 // group, group)
    assert torch.equal(after.view(shape).sum(-1), keep.view(shape).sum(-1))
    if most == 0:
        assert torch.equal(after, keep)


def test_float32_ends_where_float64_does_to_its_precision():
    inputs, targets, values, keep = case(3, rows=8, width=48, tokens=200)
    exact = run(inputs, targets, values, keep, 20)
    rough = run(inputs.float(), targets.float(), values.float(), keep, 20)
    for r in range(len(values)):
        reached = row_error(inputs, targets[:, r], values[r], rough[r])
        assert reached == pytest.approx(row_error(inputs, targets[:, r], values[r], exact[r]), rel=1e-3)


def test_rows_that_keep_all_or_nothing_stay():
    inputs, targets, values, keep = case(0, rows=2)
    keep[0], keep[1] = True, False
    assert torch.equal(run(inputs, targets, values, keep, None), keep)
