"""Sums over samples against loops, and that neither order nor shares change a bit of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber.base.ranks import Ranks
from optimum_barber.tensors import sums as module
from optimum_barber.tensors.sums import Products, Sum


def parts(count, seed, shape=(7, 5), spread=1.0):
    """Float32 contributions whose sizes differ by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** (spread * torch.randn(count, generator=generator))
    return [torch.randn(shape, generator=generator) * scale for scale in scales]


def summed(tensors):
    """Their sum, in the order in which they come."""
    total = Sum()
    for tensor in tensors:
        total.add(tensor)
    return total.over()


@given(st.integers(2, 24), st.integers(0, 2**20), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(count, seed, random):
    given_order = parts(count, seed)
    other = random.sample(given_order, count)
    assert torch.equal(summed(given_order), summed(other))


@given(st.integers(1, 12), st.integers(0, 2**20))
def test_the_sum_is_the_float64_one_rounded(count, seed):
    tensors = parts(count, seed, shape=(3, 2))
    result = summed(tensors)
    for r in range(3):
        for c in range(2):
            assert float(result[r, c]) == torch.tensor(sum(float(t[r, c]) for t in tensors), dtype=torch.float32)


@pytest.mark.parametrize("piece", [1, 8, 10**6])
@pytest.mark.parametrize("shape", [(7, 5), (7,)])
def test_pieces_do_not_matter(monkeypatch, piece, shape):
    expected = summed(parts(3, 0, shape))
    monkeypatch.setattr(module, "PIECE", piece)
    assert torch.equal(summed(parts(3, 0, shape)), expected)


def test_a_sum_is_asked_for_once_and_of_something():
    with pytest.raises(RuntimeError, match="nothing was added"):
        Sum().over()
    with pytest.raises(RuntimeError, match="nothing was added"):
        Products().over()
    total = Sum()
    total.add(torch.ones(2, 2))
    assert total.over().dtype == torch.float32
    with pytest.raises(RuntimeError, match="nothing was added"):
        total.over()


class Shares(Ranks):
    """Ranks in one process: what the others have is added to what this one has."""

    def __init__(self, others):
        self.others = iter(others)

    def sum(self, tensor):
        return tensor.add_(next(self.others))


@pytest.mark.parametrize("first", [1, 2, 5])
def test_however_many_samples_a_rank_has(first):
    tensors = parts(6, 1)
    mine, theirs = Sum(), Sum()
    for index, tensor in enumerate(tensors):
        (mine if index < first else theirs).add(tensor)
    assert torch.equal(mine.over(Shares([theirs._total])), summed(tensors))


@pytest.mark.parametrize("width", [1, 3, 4, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_in_strips_are_sums_of_outer_products(monkeypatch, width, symmetric):
    monkeypatch.setattr(module, "STRIP", 3)
    generator = torch.Generator().manual_seed(width)
    rights = [torch.randn(5, width, dtype=torch.float64, generator=generator) for _ in range(2)]
    lefts = rights if symmetric else [torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2)]
    total = Products(symmetric)
    for left, right in zip(lefts, rights, strict=True):
        total.add(left, right)
    result = total.over()
    assert result.shape == (lefts[0].shape[1], width)
    for i in range(result.shape[0]):
        for j in range(width):
            pairs = zip(lefts, rights, strict=True)
            expected = sum(float(x[i]) * float(y[j]) for left, right in pairs for x, y in zip(left, right, strict=True))
            assert float(result[i, j]) == pytest.approx(expected, rel=1e-12)
    if symmetric:
        assert torch.equal(result, result.t())


@pytest.mark.parametrize(("width", "expected"), [(2, 4), (3, 9), (4, 3 * 4 + 1), (7, 3 * 7 + 3 * 4 + 1)])
def test_a_gram_matrix_is_computed_from_the_diagonal_on(monkeypatch, width, expected):
    monkeypatch.setattr(module, "STRIP", 3)
    products = Products(symmetric=True)
    products.add(*[torch.ones(5, width)] * 2)
    assert sum(strip._total.numel() for strip in products._sums) == expected


def test_a_sum_that_goes_on_is_scaled_and_merged():
    tensors = parts(4, 2)
    mine, theirs = Sum(), Sum()
    mine.add(tensors[0])
    mine.scale(0.25)
    mine.add(tensors[1])
    theirs.add(tensors[2])
    theirs.scale(0.0)
    theirs.add(tensors[3])
    mine.merge(Shares([theirs._total]))
    expected = 0.25 * tensors[0].double() + tensors[1].double() + tensors[3].double()
    assert torch.equal(mine.value(), expected.float()) and mine.value().dtype == torch.float32
    mine.add(tensors[2])
    assert torch.equal(mine.over(), (expected + tensors[2].double()).float())
