"""The exchange of weights against a loop written from the method's text, ties included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber.prune.rebuilders.ratio import climb
from optimum_barber.tensors.exchange import Exchange, GroupExchange, RowExchange, from_groups, positive_pairs, to_groups
from optimum_barber.tensors.masks import holds_pattern
from optimum_barber.tensors.patterns import SparsityPattern

from . import oracles

RATIOS = st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.29, 0.3, 0.5, 0.7, 1.0])


@st.composite
def blocks(draw, group=1):
    """Importance (few distinct values, so ties abound) and keep masks of one to three Linears."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**31))
    levels = draw(st.sampled_from([2, 5, 10**6]))
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, columns * group) for rows, columns in shapes]
    scores = [torch.randint(0, levels, shape, generator=generator).float() / 7 for shape in shapes]
    density = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    keep = [torch.rand(shape, generator=generator) < density for shape in shapes]
    return scores, keep


@st.composite
def n_of_m_blocks(draw):
    m = draw(st.integers(2, 6))
    n = draw(st.integers(1, m - 1))
    scores, _ = draw(blocks(group=m))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = []
    for score in scores:
        order = torch.rand(score.numel() // m, m, generator=generator).argsort(1)
        keep.append((order < n).reshape(score.shape))
    return scores, keep, n, m


def lists(tensors):
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("granularity", ["block", "layer", "input", "output"])
@given(block=blocks(), ratio=RATIOS)
def test_exchange_equals_the_loop(granularity, block, ratio):
    scores, keep = block
    expected, pairs, swaps = oracles.barber_swap(lists(scores), lists(keep), granularity, ratio)
    exchange = Exchange(scores, keep, granularity, 1.0)
    rebuilt = exchange.at(ratio)
    assert exchange.pairs == pairs
    assert lists(rebuilt) == expected
    assert sum(int((new & ~old).sum()) for new, old in zip(rebuilt, keep, strict=True)) == swaps


@pytest.mark.parametrize("granularity", ["block", "layer", "input", "output"])
@given(block=blocks(), ratio=RATIOS)
def test_kept_counts_of_every_group_never_change(granularity, block, ratio):
    scores, keep = block
    rebuilt = Exchange(scores, keep, granularity, ratio).at(ratio)
    before, after = to_groups(keep, granularity), to_groups(rebuilt, granularity)
    assert all(torch.equal(b.sum(1), a.sum(1)) for b, a in zip(before, after, strict=True))


@given(block=blocks())
def test_positive_pairs_need_no_pairing(block):
    for scores, keep in zip(*block, strict=True):
        expected = [
            oracles.barber_swap([[row]], [[mask]], "layer", 1.0)[1]
            for row, mask in zip(scores.tolist(), keep.tolist(), strict=True)
        ]
        assert positive_pairs(scores, keep).tolist() == expected


@pytest.mark.parametrize("scope", ["block", "layer", "output"])
@given(block=n_of_m_blocks(), ratio=RATIOS)
def test_group_exchange_equals_the_loop(scope, block, ratio):
    scores, keep, n, m = block
    expected, pairs, _ = oracles.barber_swap_groups(lists(scores), lists(keep), m, scope, ratio)
    exchange = GroupExchange(scores, keep, m, scope, 1.0)
    rebuilt = exchange.at(ratio)
    assert exchange.pairs == pairs
    assert lists(rebuilt) == expected
    assert all(holds_pattern(mask, SparsityPattern(1 - n / m, n, m)) for mask in rebuilt)


@given(block=n_of_m_blocks(), ratio=RATIOS)
def test_row_exchange_equals_the_loop(block, ratio):
    scores, keep, n, m = block
    expected, pairs = oracles.barber_swap_rows(lists(scores), lists(keep), m, ratio)
    exchange = RowExchange(scores, keep, m, 1.0)
    rebuilt = exchange.at(ratio)
    assert exchange.pairs == pairs
    assert lists(rebuilt) == expected
    assert all(holds_pattern(mask, SparsityPattern(1 - n / m, n, m)) for mask in rebuilt)


@pytest.mark.parametrize("granularity", ["block", "layer", "input", "output"])
def test_groups_return_to_their_places(granularity):
    tensors = [torch.arange(12).reshape(3, 4), torch.arange(100, 106).reshape(2, 3)]
    groups = to_groups(tensors, granularity)
    assert lists(from_groups(groups, [t.shape for t in tensors], granularity)) == lists(tensors)


@pytest.mark.parametrize("granularity", ["block", "layer", "input", "output"])
@given(block=blocks())
def test_outliers_lie_above_the_tukey_fence(granularity, block):
    scores, keep = block
    shapes = [tuple(mask.shape) for mask in keep]
    values = []
    for group in oracles.groups_of(shapes, granularity):
        pairs = oracles.pairs_of(
            group, lambda c: float(scores[c[0]][c[1], c[2]]), lambda c: bool(keep[c[0]][c[1], c[2]])
        )
        values += [value for *_, value in pairs if value > 0]
    values.sort(reverse=True)
    expected = 0.0
    if values:
        upper, lower = values[len(values) // 4], values[3 * len(values) // 4]
        expected = sum(v > upper + 1.5 * (upper - lower) + 1e-6 for v in values) / len(values)
    assert Exchange(scores, keep, granularity, 1.0).outlier_share() == pytest.approx(expected, abs=1e-9)


def climbed(error_at, start, factors=(2.0, 0.5), standing=1.0, parabolic=False):
    """Where `climb` ends and what it measured on the way."""
    measured = []

    def measure(ratio):
        measured.append(ratio)
        return error_at(ratio)

    return *climb(measure, start, factors, standing, parabolic), measured


def test_climbing_stops_behind_the_lowest_error():
    ratio, error, measured = climbed(lambda r: abs(r - 0.4), 0.1)
    assert (ratio, measured) == (0.4, [0.1, 0.2, 0.4, 0.8])
    assert error == 0.0


def test_climbing_turns_where_up_never_helps():
    assert climbed(lambda r: abs(r - 0.1), 0.4)[::2] == (0.1, [0.4, 0.8, 0.2, 0.1, 0.05])


def test_climbing_up_goes_on_over_ratios_that_swap_nothing():
    ratio, error, _ = climbed(lambda r: 1.0 if r < 0.3 else 0.5 + abs(r - 0.4), 0.001)
    assert error == pytest.approx(0.5, abs=0.12)
    assert 0.3 < ratio < 0.6


def test_climbing_down_goes_on_until_something_beats_standing_still():
    ratio, error, measured = climbed(lambda r: 2.0 if r > 0.01 else 0.9, 0.1)
    assert ratio == measured[-2] < 0.01
    assert error == 0.9
    ratio, error, measured = climbed(lambda r: 2.0, 0.1)
    assert error is None
    assert min(measured) > 0.0009


@given(
    st.floats(0.005, 0.9),
    st.floats(0.01, 100.0),
    st.sampled_from([(2.0, 0.5), (0.5,)]),
    st.sampled_from([1 / 16, 0.25]),
)
def test_on_a_parabola_fewer_ratios_are_measured_and_the_same_one_is_found(lowest_at, curvature, factors, start):
    def error_at(ratio):
        return 1.0 + curvature * ratio * (ratio - 2 * lowest_at)

    ratio, error, measured = climbed(error_at, start, factors)
    result, its_error, fewer = climbed(error_at, start, factors, parabolic=True)
    assert (result, its_error) == (ratio, error)
    assert fewer == measured[: len(fewer)]


def test_on_a_parabola_what_cannot_be_lower_is_not_measured():
    def error_at(ratio):
        return 1.0 + ratio * (ratio - 0.5)  # lowest at 0.25

    assert climbed(error_at, 0.25)[2] == [0.25, 0.5, 0.125]
    assert climbed(error_at, 0.25, parabolic=True)[2] == [0.25, 0.5]
    assert climbed(error_at, 0.125)[2] == [0.125, 0.25, 0.5]
    assert climbed(error_at, 0.125, parabolic=True)[2] == [0.125, 0.25]
