"""Selecting, checking and packing masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber.base.errors import BarberError
from optimum_barber.tensors import masks
from optimum_barber.tensors.masks import PackedMask, fill_up, holds_pattern, keep_highest
from optimum_barber.tensors.patterns import SparsityPattern

from . import oracles


@st.composite
def tied_scores(draw, multiple=1):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6)) * multiple
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, draw(st.sampled_from([2, 4, 10**6])), (rows, columns), generator=generator).float()


@pytest.mark.parametrize("scope", ["row", "layer"])
@given(scores=tied_scores(), sparsity=st.sampled_from([0.1, 0.29, 0.3, 0.5, 0.7, 0.9, 0.99]))
def test_unstructured_masks_equal_the_loop(scope, scores, sparsity):
    keep = keep_highest(scores, SparsityPattern(sparsity), scope)
    rows = [scores.flatten().tolist()] if scope == "layer" else scores.tolist()
    for row, mask in zip(rows, [keep.flatten().tolist()] if scope == "layer" else keep.tolist(), strict=True):
        pruned = oracles.lowest_pruned(row, oracles.share(sparsity, len(row)))
        assert {i for i, kept in enumerate(mask) if not kept} == pruned


@given(data=st.data(), piece=st.integers(1, 20))
def test_ties_are_counted_piece_by_piece(data, piece):
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    drawn = data.draw(st.lists(st.sampled_from("cto"), min_size=rows * width, max_size=rows * width))
    states = [drawn[r * width : (r + 1) * width] for r in range(rows)]
    counts = [data.draw(st.integers(row.count("c"), width)) for row in states]
    chosen, tied = (torch.tensor([[state == kind for state in row] for row in states]) for kind in "ct")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "PIECE", piece)
        result = fill_up(chosen, tied, torch.tensor(counts)[:, None]).tolist()
    for row, count, states_of_row in zip(result, counts, states, strict=True):
        room = count - states_of_row.count("c")
        places = [i for i, state in enumerate(states_of_row) if state == "t"][:room]
        assert [i for i, taken in enumerate(row) if taken] == sorted(
            [*places, *(i for i, state in enumerate(states_of_row) if state == "c")]
        )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (8, 16), (3, 5)])
@given(data=st.data())
def test_n_of_m_masks_equal_the_loop(n, m, data):
    scores = data.draw(tied_scores(multiple=m))
    pattern = SparsityPattern.parse(f"{n}:{m}", None)
    keep = keep_highest(scores, pattern)
    for row, mask in zip(scores.tolist(), keep.tolist(), strict=True):
        for start in range(0, len(row), m):
            pruned = oracles.lowest_pruned(row[start : start + m], m - n)
            assert {j for j in range(m) if not mask[start + j]} == pruned
    assert holds_pattern(keep, pattern)
    broken = keep.clone()
    broken[0, 0] = ~broken[0, 0]
    assert not holds_pattern(broken, pattern)


@given(shape=st.tuples(st.integers(1, 7), st.integers(1, 19)), seed=st.integers(0, 2**31))
def test_packing_loses_nothing(shape, seed):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    packed = PackedMask.pack(keep)
    assert torch.equal(packed.unpack(), keep)
    assert packed.bits.numel() == -(-keep.numel() // 8)
    assert packed.pruned == int((~keep).sum())


def test_bits_lie_where_the_format_says():
    keep = torch.tensor([[True, False, True, False, False, False, False, False, True]])
    assert PackedMask.pack(keep).bits.tolist() == [0b101, 0b1]


def test_the_hash_knows_shape_and_bits():
    keep = torch.ones(4, 2, dtype=torch.bool)
    other = keep.clone()
    other[3, 1] = False
    hashes = {PackedMask.pack(k).sha256 for k in (keep, keep.reshape(2, 4), other)}
    assert len(hashes) == 3


@pytest.mark.parametrize("pattern", ["4:2", "2:0", "0:4", "4:4", "x", "2:4:8", "-1:4", ""])
def test_illegal_patterns_are_refused(pattern):
    with pytest.raises(BarberError, match="is not legal"):
        SparsityPattern.parse(pattern, None)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_illegal_sparsities_are_refused(sparsity):
    with pytest.raises(BarberError, match="outside"):
        SparsityPattern.parse(None, sparsity)


def test_a_pattern_implies_its_sparsity():
    assert SparsityPattern.parse("2:4", 0.5).sparsity == 0.5
    assert SparsityPattern.parse("1:4", None).sparsity == 0.75
    with pytest.raises(BarberError, match="contradicts"):
        SparsityPattern.parse("2:4", 0.6)
