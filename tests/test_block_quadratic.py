"""The block error around the masks by the rows of its inner Linears, against finite differences and Jacobians."""

import itertools

import pytest
import torch

from optimum_barber.prune import block_quadratic
from optimum_barber.prune.block_quadratic import PROBED, expand
from optimum_barber.prune.quadratic import quadratics
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.rebuilders import chain_of
from optimum_barber.tensors import objectives as judges

from .test_quadratic import token_weights
from .test_trial import sample_error, trial  # noqa: F401

INNER = ["gate", "up"]


def units(trial):  # noqa: F811
    """What turns sums over tokens and channels into the mean squared errors of the samples."""
    return [y.numel() for y in trial.targets]


def summed_error(trial, weights):  # noqa: F811
    pairs = zip(trial.inputs, trial.targets, units(trial), strict=True)
    return sum(sample_error(trial, weights, x, y) * unit for x, y, unit in pairs)


def jacobian(trial, name, sample):  # noqa: F811
    """(outputs, out, in) of one sample's output by one Linear's sparse weights."""
    linears = {n: m.weight.data for n, m in trial.linears.items()}
    sparse = {n: w * trial.masks[n] for n, w in linears.items()}

    def output(weight):
        others = {f"{n}.weight": w for n, w in (sparse | {name: weight}).items()}
        return torch.func.functional_call(trial.forward, others, (sample,)).flatten()

    return torch.autograd.functional.jacobian(output, sparse[name])


def test_the_correlation_is_half_the_falling_slope_of_the_summed_error(trial):  # noqa: F811
    result = expand(trial, trial.masks, INNER).models
    plain = quadratics(trial, trial.masks, INNER)
    sparse = {n: m.weight.data * trial.masks[n] for n, m in trial.linears.items()}
    for name in INNER:
        worth = worths(trial, name) / plain[name].gram.diagonal().sum()
        for r, i in itertools.product(range(4), range(3)):
            moved = []
            for step in (1e-6, -1e-6):
                shifted = {n: w.clone() for n, w in sparse.items()}
                shifted[name][r, i] += step
                moved.append(summed_error(trial, shifted))
            slope = (moved[0] - moved[1]) / 2e-6
            assert float(result[name].correlation[r, i] * worth[r]) == pytest.approx(-slope / 2, rel=1e-5, abs=1e-8)
        assert torch.allclose(result[name].gram, plain[name].gram)
    assert result["gate"].gram is result["up"].gram


def worths(trial, name):  # noqa: F811
    """sum_s ||(J_s^T u_s)_r||^2 for the signs that are drawn, (out,), scaled up to all samples."""
    total = 0
    for index, x in list(enumerate(trial.inputs))[::PROBED]:
        result = jacobian(trial, name, x)
        signs = judges.random_signs(torch.empty(1, 5, 3, dtype=torch.float64), index).flatten()
        total = total + (result * signs[:, None, None]).sum(0).square().sum(1)
    return total * trial.inputs.total / len(range(0, trial.inputs.total, PROBED))


def test_random_signs_find_the_squared_jacobian_on_average(trial, monkeypatch):  # noqa: F811
    trial.inputs = trial.inputs.like([next(iter(trial.inputs))[:, :2]])
    trial.targets = trial.targets.like([next(iter(trial.targets))[:, :2]])
    patterns = [torch.tensor(p, dtype=torch.float64).view(1, 2, 3) for p in itertools.product((-1.0, 1.0), repeat=6)]
    result = {name: 0.0 for name in INNER}
    for signs in patterns:
        monkeypatch.setattr(judges, "random_signs", lambda *_, signs=signs: signs)
        slopes = block_quadratic._Slopes(trial, INNER, probing=True)
        trial.differentiate(trial.masks, slopes.add)
        for name in INNER:
            result[name] = result[name] + slopes.worth[name].over() / len(patterns)
    for name in INNER:
        expected = jacobian(trial, name, next(iter(trial.inputs))).square().sum((0, 2))
        assert torch.allclose(result[name], expected)


def test_signs_are_the_same_every_time_and_others_for_every_sample():
    like = torch.empty(1, 64, 8)
    one, again, other = (judges.random_signs(like, seed) for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.dtype == like.dtype and set(one.unique().tolist()) == {-1.0, 1.0}


def test_with_full_shrinkage_every_weight_stands_alone(trial):  # noqa: F811
    result = expand(trial, trial.masks, INNER, shrinkage=1.0).models["up"]
    gram = quadratics(trial, trial.masks, INNER)["up"].gram
    missing = trial.weight("up") - trial.weight("up", trial.masks["up"])
    assert torch.allclose(result.gram, torch.diag(gram.diagonal()))
    assert torch.allclose(result.correlation, missing * gram.diagonal())


def test_the_error_is_measured_on_the_way_tokens_weighed(trial):  # noqa: F811
    trial.token_weights = token_weights(trial)
    expand(trial, trial.masks, INNER)
    passes = trial.forward_passes
    measured = trial.error(trial.masks)
    assert trial.forward_passes == passes == 0 and trial.gradient_passes == 1
    assert measured == pytest.approx(trial.error({n: keep.clone() for n, keep in trial.masks.items()}))


def test_rows_on_which_nothing_depends_stay_finite(trial):  # noqa: F811
    trial.masks["down"][:, 0] = False
    result = expand(trial, trial.masks, INNER, shrinkage=0.3).models
    assert all(torch.isfinite(q.correlation).all() for q in result.values())
    trial.masks = {name: torch.zeros_like(keep) for name, keep in trial.masks.items()}
    result = expand(trial, trial.masks, INNER, shrinkage=0.3).models
    assert all(torch.isfinite(q.correlation).all() for q in result.values())


@pytest.mark.parametrize("rounds", [1, 4])
def test_rounds_never_raise_the_block_error_and_keep_every_row(trial, rounds):  # noqa: F811
    config = RebuildConfig(method="gauss-newton", newton_rounds=rounds)
    before = trial.error(trial.masks)
    outcome = chain_of(config)[0](trial)
    assert trial.error(outcome.masks) <= before
    assert len(outcome.rounds) <= rounds
    for name, keep in outcome.masks.items():
        assert torch.equal(keep.sum(1), trial.masks[name].sum(1))
    accepted = [record["accepted"] for record in outcome.rounds]
    assert accepted == sorted(accepted, reverse=True)
    assert any(accepted) == (outcome.masks is not trial.masks)
