"""Gram matrices and correlations of a block's Linears, against sums over tokens in plain float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_barber.models.activations import Activations
from optimum_barber.prune.block_cache import BlockCache
from optimum_barber.prune.quadratic import closing_linear, quadratics
from optimum_barber.tensors.sums import Products

from .test_trial import ToyBlock, trial  # noqa: F401


def worn(trial):  # noqa: F811
    """The toy block with the trial's masks on, as a module of its own."""
    block = ToyBlock()
    block.load_state_dict(trial.forward.state_dict())
    for name, keep in trial.masks.items():
        block.get_submodule(name).weight.data *= keep
    return block


def token_weights(trial):  # noqa: F811
    torch.manual_seed(1)
    return Activations([torch.rand(1, x.shape[1], 1, dtype=x.dtype) + 0.1 for x in trial.inputs])


@pytest.mark.parametrize("weighted", [False, True])
@torch.no_grad()
def test_gram_and_correlation_are_sums_over_tokens(trial, weighted):  # noqa: F811
    trial.token_weights = token_weights(trial) if weighted else None
    block = worn(trial)
    result = quadratics(trial, trial.masks, list(trial.linears))
    gram = {name: torch.zeros(m.in_features, m.in_features).double() for name, m in trial.linears.items()}
    correlation = {name: torch.zeros(m.weight.shape).double() for name, m in trial.linears.items()}
    for x, y, w in trial.samples():
        for t in range(x.shape[1]):
            row = x[0, t]
            inner = torch.nn.functional.silu(block.gate(row)) * block.up(row)
            weight = 1.0 if w is None else float(w[0, t, 0])
            for name, entering in (("gate", row), ("up", row), ("down", inner)):
                gram[name] += weight * torch.outer(entering, entering)
                linear, dense = block.get_submodule(name), trial.linears[name]
                missing = y[0, t] - linear(entering) if name == "down" else dense(entering) - linear(entering)
                correlation[name] += weight * torch.outer(missing, entering)
    for name, quadratic in result.items():
        assert torch.allclose(quadratic.gram, gram[name])
        assert torch.allclose(quadratic.correlation, correlation[name])
    assert result["gate"].gram is result["up"].gram


@pytest.mark.parametrize("weighted", [False, True])
@torch.no_grad()
def test_the_closing_linear_predicts_the_block_error_exactly(trial, weighted):  # noqa: F811
    trial.token_weights = token_weights(trial) if weighted else None
    quadratic = quadratics(trial, trial.masks, ["down"])["down"]
    moved = trial.masks | {"down": ~trial.masks["down"]}
    change = trial.weight("down", moved["down"]) - trial.weight("down", trial.masks["down"])
    predicted = ((change @ quadratic.gram) * change).sum() - 2 * (change * quadratic.correlation).sum()
    values = sum(y.numel() for y in trial.targets)
    assert (trial.error(moved) - trial.error(trial.masks)) * values == pytest.approx(float(predicted))


@torch.no_grad()
def test_watching_measures_the_error_and_keeps_the_outputs(trial):  # noqa: F811
    quadratics(trial, trial.masks, ["gate"])
    passes = trial.forward_passes
    trial.error(trial.masks), trial.outputs(trial.masks)
    assert trial.forward_passes == passes


def another(trial):  # noqa: F811
    """Other masks."""
    return {name: ~keep for name, keep in trial.masks.items()}


@pytest.mark.parametrize("factor", [1, 2])
@torch.no_grad()
def test_a_second_pass_sums_what_a_first_one_would(trial, factor):  # noqa: F811
    inner, names = trial.forward, list(trial.linears)
    trial.forward = lambda x: inner(x) * factor  # with a factor behind it no Linear closes the block
    quadratics(trial, trial.masks, names, 0.1)
    result = quadratics(trial, another(trial), names, 0.1)
    trial.cache = BlockCache()
    for name, expected in quadratics(trial, another(trial), names, 0.1).items():
        assert torch.equal(result[name].gram, expected.gram)
        assert torch.equal(result[name].correlation, expected.correlation)


@torch.no_grad()
def test_gram_matrices_that_no_mask_reaches_are_summed_once(trial, monkeypatch):  # noqa: F811
    made, add = [], Products.add
    monkeypatch.setattr(Products, "add", lambda self, left, right: (made.append(right.shape), add(self, left, right)))
    first = quadratics(trial, trial.masks, ["gate", "up"], 0.1)
    assert len(made) == trial.inputs.total
    second = quadratics(trial, another(trial), ["gate", "up", "down"], 0.1)
    assert len(made) == 3 * trial.inputs.total and second["up"].gram is first["gate"].gram
    quadratics(trial, trial.masks, ["gate"], 0.2)
    assert len(made) == 4 * trial.inputs.total


@torch.no_grad()
def test_a_gram_matrix_taken_over_is_not_summed_and_the_correlation_is(trial, monkeypatch):  # noqa: F811
    near = quadratics(trial, another(trial), ["down"])["down"].gram
    own = quadratics(trial, trial.masks, ["down"])["down"]
    made, add = [], Products.add
    monkeypatch.setattr(Products, "add", lambda self, left, right: (made.append(right.shape), add(self, left, right)))
    result = quadratics(trial, trial.masks, ["down"], grams={"down": near})["down"]
    assert result.gram is near and not torch.allclose(near, own.gram)
    assert torch.equal(result.correlation, own.correlation)
    assert len(made) == trial.inputs.total


def test_the_closing_linear_is_the_last_one_only_if_nothing_lies_behind_it(trial):  # noqa: F811
    assert closing_linear(trial) == "down"
    inner = trial.forward
    trial.forward = lambda x: inner(x) * 2
    trial.cache = BlockCache()
    assert closing_linear(trial) is None


@given(shrinkage=st.floats(0, 1), name=st.sampled_from(["gate", "down"]))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_shrinkage_is_a_share_of_tokens_with_uncorrelated_inputs(trial, shrinkage, name):  # noqa: F811
    plain, shrunk = (quadratics(trial, trial.masks, [name], share)[name] for share in (0.0, shrinkage))
    weight, keep = trial.weight(name), trial.masks[name]
    for i, row in enumerate(plain.gram.tolist()):
        for j, value in enumerate(row):
            expected = value if i == j else (1 - shrinkage) * value
            assert float(shrunk.gram[i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for r, row in enumerate(plain.correlation.tolist()):
        for j, value in enumerate(row):
            missing = 0.0 if keep[r, j] else float(weight[r, j])
            expected = (1 - shrinkage) * value + shrinkage * missing * float(plain.gram[j, j])
            assert float(shrunk.correlation[r, j]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
