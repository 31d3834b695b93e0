"""DSnoT's cycles, one at a time in plain loops, against all at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.tensors.dsnot import grow_and_prune

from .conftest import tiny_model, tiny_windows


def cycle(w, keep, mu, variance, norm, sign, used, group):
    """The (grown, pruned) pair of one cycle, None where there is none."""
    growing = {j: -sign * w[j] * mu[j] / variance[j] for j in range(len(w)) if not keep[j] and sign * w[j] * mu[j] < 0}
    pruning = {i: abs(w[i]) * norm[i] for i in range(len(w)) if keep[i] and sign * w[i] * mu[i] > 0}
    for j in sorted(growing, key=lambda j: (-growing[j], j)):
        place = None if group is None else j // group
        partners = [i for i in pruning if group is None or i // group == place]
        if partners and place not in used:
            return j, min(partners, key=lambda i: (pruning[i], i)), place
    return None


def expected(w, keep, mu, variance, norm, cycles, group):
    keep, used = list(keep), set()
    error = -sum(a * m for a, m, k in zip(w, mu, keep, strict=True) if not k)
    sign = (error > 0) - (error < 0)
    for _ in range(cycles):
        actual = cycle(w, keep, mu, variance, norm, sign, used, group) if sign * error > 0 else None
        if actual is None:
            break
        grown, pruned, place = actual
        if place is not None:
            used.add(place)
        keep[grown], keep[pruned] = True, False
        error += w[grown] * mu[grown] - w[pruned] * mu[pruned]
        mu = [0.0 if at in (grown, pruned) else m for at, m in enumerate(mu)]  # neither moves twice
    return keep


@given(seed=st.integers(0, 2**31), group=st.sampled_from([None, 4]), cycles=st.sampled_from([1, 3, 50]))
@settings(max_examples=40, deadline=None)
def test_cycles_one_by_one(seed, group, cycles):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    mu, variance, norm = (torch.rand(16, generator=generator, dtype=torch.float64) + 0.1 for _ in range(3))
    mu = mu * torch.randn(16, generator=generator, dtype=torch.float64).sign()
    ranks = torch.rand(5, 4, 4, generator=generator).argsort(-1).argsort(-1)
    keep = (ranks < 2).view(5, 16)
    after = grow_and_prune(w, keep, mu, variance, norm, cycles, group)
    for r in range(5):
        lists = (t.tolist() for t in (w[r], keep[r], mu, variance, norm))
        assert after[r].tolist() == expected(*lists, cycles, group)


@pytest.mark.parametrize("settings_", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_as_a_rebuilder_it_never_raises_the_error(family, settings_):
    config = BarberConfig(producer="magnitude", rebuild="dsnot", **settings_)
    result = BarberSparsifier(tiny_model(family)).sparsify(config, tiny_windows(), quiet=True)
    assert all(block.error_after <= block.error_before for block in result.reports)
    assert any(block.rounds[0]["swaps"] for block in result.reports)


def test_an_input_without_any_variance_is_no_division_by_zero():
    w = torch.tensor([[1.0, -1.0, 0.5, 0.25]])
    keep = torch.tensor([[True, False, False, True]])
    after = grow_and_prune(w, keep, torch.ones(4), torch.zeros(4), torch.ones(4), 50)
    assert after.sum() == 2
