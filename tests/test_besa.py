"""BESA: rates against loops and a brute-force grid, counts that are exact, patterns that fix them refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimum_barber import BarberConfig, BarberSparsifier, verify_checkpoint
from optimum_barber.models.activations import Activations
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.rebuilders.besa import besa
from optimum_barber.prune.trial import Trial
from optimum_barber.tensors.besa import (
    beta_gradient,
    bucket_of,
    candidate_rates,
    exact_counts,
    keep_of_buckets,
    row_rates,
    softmax_gradient,
    starting_logits,
)
from optimum_barber.tensors.masks import keep_highest
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import tiny_model, tiny_windows


def chances(beta):
    """P_k of each bucket of one row, by the definition."""
    return [1 - sum(beta[:k]) for k in range(len(beta) + 1)]


def slow_rate(beta):
    return sum(share * (d + 1) / (len(beta) + 1) for d, share in enumerate(beta))


def betas(rows, buckets, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, buckets - 1, generator=generator, dtype=torch.float64).mul(2).softmax(1)


def test_rates_and_kept_buckets_are_those_of_the_definition():
    beta = betas(5, 8)
    keep, rates = keep_of_buckets(beta), row_rates(beta)
    for row, coefficients in enumerate(beta.tolist()):
        assert rates[row].item() == pytest.approx(slow_rate(coefficients))
        assert keep[row].tolist() == [chance < slow_rate(coefficients) for chance in chances(coefficients)]
        assert sum(chances(coefficients)) / 8 == pytest.approx(slow_rate(coefficients))


def test_buckets_are_equal_parts_of_the_sorted_row():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0, 5.0, 4.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    assert bucket_of(scores, 3).tolist() == [[1, 0, 1, 0, 2, 2], [0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_learning_starts_at_the_target(rate):
    logits = starting_logits(rate, 3, 100)
    assert logits.shape == (3, 99)
    assert row_rates(logits.double().softmax(1)).tolist() == pytest.approx([rate] * 3, abs=1e-4)


def test_gradients_by_beta_and_logits_are_those_of_the_relaxed_mask():
    generator = torch.Generator().manual_seed(1)
    width, buckets = 12, 6
    by_mask = torch.randn(2, width, generator=generator, dtype=torch.float64)
    bucket = bucket_of(torch.rand(2, width, generator=generator), buckets)
    logits = torch.randn(2, buckets - 1, generator=generator, dtype=torch.float64, requires_grad=True)
    beta = logits.softmax(1)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for column in range(width):  # M = 1 - P
            loss = loss + by_mask[row, column] * beta[row, : int(bucket[row, column])].sum()
    (expected,) = torch.autograd.grad(loss, logits)
    gradient = beta_gradient(by_mask, bucket, buckets)
    torch.testing.assert_close(softmax_gradient(beta.detach(), gradient), expected)


@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_counts_meet_the_total_and_stay_within_each_row(seed, share):
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(9, generator=generator)
    widths = torch.randint(1, 40, (9,), generator=generator)
    total = round(share * int(widths.sum()))
    counts = exact_counts(rates, widths, total)
    assert int(counts.sum()) == total and bool(((counts >= 0) & (counts <= widths)).all())


def test_counts_that_are_due_exactly_are_given():
    widths = torch.tensor([10, 10, 20])
    assert exact_counts(torch.tensor([0.2, 0.8, 0.5]), widths, 20).tolist() == [2, 8, 10]
    assert exact_counts(torch.tensor([0.3, 0.9, 0.6]), widths, 20).tolist() == [2, 8, 10]


def toy(samples=600):
    """A Linear of two rows on trial, one of which needs far more weights than the other."""
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(40, 2, bias=False).requires_grad_(False)
    linear.weight.data = torch.randn(2, 40, generator=generator)
    linear.weight.data[1] *= 0.2
    inputs = Activations([torch.randn(1, 8, 40, generator=generator) for _ in range(samples)])
    targets = inputs.like(linear(x) for x in inputs)
    trial = Trial(linear, {"linear": linear}, inputs, targets, SparsityPattern(0.5))
    trial.masks = {"linear": keep_highest(linear.weight.abs(), SparsityPattern(0.5))}
    return trial


def test_learned_rates_are_those_of_a_brute_force_grid():
    trial = toy()
    norm = torch.cat(list(trial.inputs), 1).flatten(0, 1).norm(dim=0)
    scores = trial.weight("linear").abs() * norm
    errors = {}
    for count in range(1, 40):  # pruned in the first row, the rest in the second
        keep = torch.zeros(2, 40, dtype=torch.bool)
        keep[0, scores[0].argsort()[count:]] = True
        keep[1, scores[1].argsort()[40 - count :]] = True
        errors[count] = trial.error({"linear": keep})
    best = min(errors, key=errors.get)
    assert 20 - best > 4  # far from alike
    masks = besa(trial, RebuildConfig(method="besa")).masks["linear"]
    learned = 40 - int(masks[0].sum())
    assert abs(learned - best) <= 2 and errors[learned] < 1.02 * errors[best] < 0.95 * errors[20]
    assert int(masks.sum()) == 40


@pytest.mark.parametrize(("producer", "sparsity"), [("wanda", 0.5), ("magnitude", 0.37), ("random", 0.6)])
def test_a_block_keeps_its_count_and_its_error_does_not_rise(producer, sparsity, tmp_path):
    config = BarberConfig(producer=producer, sparsity=sparsity, rebuild="besa+swaps")
    BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(12), tmp_path / "rebuilt", quiet=True)
    plain = BarberConfig(producer=producer, sparsity=sparsity, rebuild="none")
    before = BarberSparsifier(tiny_model()).sparsify(plain, tiny_windows(12), quiet=True)
    outcome = verify_checkpoint(tmp_path / "rebuilt")
    assert outcome.faults == []
    assert outcome.pruned == sum(mask.pruned for mask in before.masks.values())


def test_the_error_falls_and_the_same_run_gives_the_same_masks():
    config = BarberConfig(producer="wanda", sparsity=0.5, rebuild="besa")
    runs = [BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(12), quiet=True) for _ in range(2)]
    for report in runs[0].reports:
        assert report.error_after <= report.error_before
    assert any(report.swaps for report in runs[0].reports)
    for name, mask in runs[0].masks.items():
        assert mask.sha256 == runs[1].masks[name].sha256


def test_masks_that_raise_the_error_are_left_unless_asked_for():
    trial = toy(samples=2)
    trial.masks = {"linear": trial.weight("linear").abs() >= trial.weight("linear").abs().flatten().kthvalue(41).values}
    best = trial.masks
    assert besa(trial, RebuildConfig(method="besa")).masks is best
    always = besa(trial, RebuildConfig(method="besa", accept="always"))
    assert always.masks is not best and always.rounds[0]["accepted"]
    assert trial.error(always.masks) > trial.error(best)


def test_patterns_that_fix_counts_are_refused():
    with pytest.raises(ValueError, match="rebuild 'besa' makes no sense with pattern 2:4"):
        BarberConfig(pattern="2:4", rebuild="besa+swaps").sparsity_pattern()
    assert candidate_rates(4).tolist() == [0.25, 0.5, 0.75]
