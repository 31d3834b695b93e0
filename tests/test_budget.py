"""Counts that are exact to the weight, and the split of least error against a search over a grid."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber.base.errors import BarberError
from optimum_barber.prune.producers.sparsegpt import sparsegpt
from optimum_barber.tensors.budget import ErrorCurve, least_error, patterns_of, quotas
from optimum_barber.tensors.masks import keep_highest
from optimum_barber.tensors.patterns import SparsityPattern

from .test_producers import linear_input

SHAPES = st.lists(st.tuples(st.integers(4, 9), st.integers(4, 9)), min_size=1, max_size=3)
CURVES = st.lists(st.tuples(st.floats(-8, 8), st.floats(0.5, 20), st.integers(1, 5)), min_size=1, max_size=6)


@st.composite
def divided(draw):
    """Sizes of Linears by block, a target and shares that come to it together."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=5))
    sizes = {f"b{i}": {f"b{i}.l{j}": r * c for j, (r, c) in enumerate(block)} for i, block in enumerate(shapes)}
    target = draw(st.sampled_from([0.3, 0.5, 0.6, 0.7]))
    away = [draw(st.floats(-0.1, 0.1)) for _ in sizes]
    weights = [sum(linears.values()) for linears in sizes.values()]
    mean = sum(a * w for a, w in zip(away, weights, strict=True)) / sum(weights)
    scale = 1 / max(1, *(abs(a - mean) / 0.1 for a in away))
    return sizes, target, {b: target + (a - mean) * scale for b, a in zip(sizes, away, strict=True)}


@given(divided())
def test_counts_are_exact_together_and_less_than_a_weight_off_each(case):
    sizes, target, shares = case
    counts = quotas(shares, sizes, target)
    total = sum(sum(linears.values()) for linears in sizes.values())
    assert sum(counts.values()) == math.floor(Fraction(str(target)) * total)
    assert list(counts) == [name for linears in sizes.values() for name in linears]
    for block, linears in sizes.items():
        for name, weights in linears.items():
            assert abs(counts[name] - shares[block] * weights) < 1 + 1e-6 + weights / total


def test_the_largest_fractions_have_the_rest():
    sizes = {"a": {"a.x": 9, "a.y": 7}, "b": {"b.x": 4}}
    assert quotas({"a": 0.5, "b": 0.5}, sizes, 0.5) == {"a.x": 5, "a.y": 3, "b.x": 2}
    with pytest.raises(BarberError, match=r"the allocation's shares come to sparsity 0.5400, expected 0.5$"):
        quotas({"a": 0.5, "b": 0.7}, sizes, 0.5)


@given(divided(), st.integers(0, 1000))
def test_masks_hold_the_counts_row_by_row(case, seed):
    sizes, target, shares = case
    patterns = patterns_of(shares, sizes, target)
    assert not patterns or patterns.keys() == {*shares, *(name for linears in sizes.values() for name in linears)}
    generator = torch.Generator().manual_seed(seed)
    for name, count in quotas(shares, sizes, target).items() if patterns else ():
        weights = next(linears[name] for linears in sizes.values() if name in linears)
        rows = max(d for d in range(1, 10) if weights % d == 0)
        scores = torch.rand(rows, weights // rows, generator=generator)
        keep = keep_highest(scores, patterns[name])
        pruned = (~keep).sum(1).tolist()
        assert sum(pruned) == count == patterns[name].pruned(weights)
        assert max(pruned) - min(pruned) <= 1
        assert pruned == sorted(pruned, reverse=True)
        assert all(
            scores[i][~keep[i]].max() <= scores[i][keep[i]].min() for i in range(rows) if 0 < pruned[i] < len(keep[i])
        )
        assert int((~keep_highest(scores, patterns[name], "layer")).sum()) == count


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_a_count_survives_as_a_ratio(rows, columns, data):
    count = data.draw(st.integers(0, rows * columns - 1))
    pattern = SparsityPattern.of_count(count, rows * columns)
    assert pattern.pruned(rows * columns) == count
    assert pattern.pruned(columns) == count // rows
    each, more = pattern.pruned_of(rows, columns)
    assert each * rows + more == count and 0 <= more < rows


def test_equal_shares_are_the_pattern_as_it_was():
    sizes = {"a": {"a.x": 30}, "b": {"b.x": 12}}
    assert patterns_of({"a": 0.7, "b": 0.7}, sizes, 0.7) == {}


@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 23])
def test_sparsegpt_prunes_the_count_over_its_blocks_of_columns(count):
    given_input, _ = linear_input(SparsityPattern.of_count(count, 24))
    for size in (3, 8):
        assert int((~sparsegpt(given_input, block_size=size).keep).sum()) == count


def predicted(curves, shares):
    return sum(math.exp(level + slope * s) for (level, slope, _), s in zip(curves, shares, strict=True))


@given(CURVES, st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([0.05, 0.1, 0.25]))
def test_the_split_is_within_bounds_and_meets_the_target(curves, target, spread):
    weights = [count for *_, count in curves]
    low, high = target - spread, target + spread
    shares = least_error([ErrorCurve(level, slope) for level, slope, _ in curves], weights, target, low, high)
    assert all(low <= s <= high for s in shares)
    total = sum(s * w for s, w in zip(shares, weights, strict=True))
    assert total == pytest.approx(target * sum(weights), abs=1e-9)


@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(0.5, 12), st.integers(1, 3)), min_size=2, max_size=3))
def test_no_split_on_a_fine_grid_is_better(curves):
    """Every block but the last on a grid of 0.1 %, the last one as the total has it."""
    weights, target, spread = [count for *_, count in curves], 0.5, 0.05
    result = least_error(
        [ErrorCurve(level, slope) for level, slope, _ in curves], weights, target, target - spread, target + spread
    )
    grid = [target + spread * k / 50 for k in range(-50, 51)]
    best = math.inf
    for others in itertools.product(grid, repeat=len(curves) - 1):
        last = (target * sum(weights) - sum(s * w for s, w in zip(others, weights, strict=False))) / weights[-1]
        if abs(last - target) <= spread + 1e-12:
            best = min(best, predicted(curves, [*others, last]))
    assert predicted(curves, result) <= best * (1 + 1e-9)


def test_a_curve_goes_through_what_lies_on_it_and_never_falls():
    errors = [math.exp(-3 + 4 * s) for s in (0.4, 0.5, 0.6)]
    curve = ErrorCurve.through([0.4, 0.5, 0.6], errors)
    assert (curve.level, curve.slope) == pytest.approx((-3, 4))
    assert curve(0.45) == pytest.approx(math.exp(-1.2))
    slope = 4 * math.exp(-3 + 4 * 0.45)
    assert curve.where(math.log(slope / 7), 7) == pytest.approx(0.45)
    for flat in ([0.0, 0.0, 0.0], [2.0, 1.0, 0.5], [1.0, 1.0, 1.0]):
        assert ErrorCurve.through([0.4, 0.5, 0.6], flat).slope == pytest.approx(1e-6)


def test_blocks_whose_error_does_not_rise_are_pruned_first():
    curves = [ErrorCurve.through([0.4, 0.5, 0.6], e) for e in ([1.0, 1.0, 1.0], [1.0, 2.0, 4.0], [1.0, 3.0, 9.0])]
    assert least_error(curves, [1, 1, 1], 0.5, 0.4, 0.6)[0] == pytest.approx(0.6)
    assert least_error(curves[:1] * 3, [1, 2, 3], 0.5, 0.4, 0.6)[0] == pytest.approx(0.5, abs=0.1)
