"""Errors and gradients of a block on trial, against finite differences and plain loops in float64."""

import gc
from weakref import ref

import pytest
import torch
from torch import nn

from optimum_barber.models.activations import Activations
from optimum_barber.prune.trial import Trial
from optimum_barber.tensors.derivatives import backward
from optimum_barber.tensors.patterns import SparsityPattern
from optimum_barber.tensors.scores import importance


class ToyBlock(nn.Module):
    """A gated MLP in float64."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(3, 4, bias=False, dtype=torch.float64)
        self.up = nn.Linear(3, 4, dtype=torch.float64)
        self.down = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def trial():
    torch.manual_seed(0)
    block = ToyBlock()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    inputs = Activations(torch.randn(1, 5, 3, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        targets = Activations([block(x) for x in inputs])
        masks = {name: torch.rand(m.weight.shape) < 0.6 for name, m in linears.items()}
        return Trial(block, linears, inputs, targets, SparsityPattern(0.4), masks)


def sample_error(trial, weights, x, target):
    """mean((Block(V, x) - target)^2) with the given weights, and the dense ones restored."""
    before = {name: linear.weight.data for name, linear in trial.linears.items()}
    for name, linear in trial.linears.items():
        linear.weight.data = weights[name]
    with torch.no_grad():
        output = trial.forward(x)
    for name, linear in trial.linears.items():
        linear.weight.data = before[name]
    return float(((output - target) ** 2).mean())


def expected_gradients(trial, expansion, reduction):
    """Central differences of every sample's error at V, reduced as the methods define it."""
    dense = {name: linear.weight.data.clone() for name, linear in trial.linears.items()}
    sparse = {name: weight * trial.masks[name] for name, weight in dense.items()}
    at = sparse if expansion == "sparse" else dense
    reduced = {}
    for name, weight in at.items():
        reduced[name] = torch.zeros_like(weight)
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                slopes = []
                for x, y in zip(trial.inputs, trial.targets, strict=True):
                    target = y
                    if expansion == "dense":
                        before = {n: m.weight.data for n, m in trial.linears.items()}
                        for n, m in trial.linears.items():
                            m.weight.data = sparse[n]
                        with torch.no_grad():
                            target = trial.forward(x)
                        for n, m in trial.linears.items():
                            m.weight.data = before[n]
                    moved = []
                    for step in (1e-6, -1e-6):
                        shifted = {n: w.clone() for n, w in at.items()}
                        shifted[name][i, j] += step
                        moved.append(sample_error(trial, shifted, x, target))
                    slopes.append((moved[0] - moved[1]) / 2e-6)
                mean = sum(slopes) / len(slopes)
                rms = (sum(s * s for s in slopes) / len(slopes)) ** 0.5
                reduced[name][i, j] = rms if reduction == "rms" else abs(mean)
    return reduced


@pytest.mark.parametrize("reduction", ["rms", "mean"])
@pytest.mark.parametrize("expansion", ["sparse", "dense"])
def test_gradients_equal_finite_differences(trial, expansion, reduction):
    expected = expected_gradients(trial, expansion, reduction)
    for name, gradient in trial.gradients(trial.masks, expansion, reduction).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def test_gradients_come_one_at_a_time_and_the_same_to_all_names_of_a_leaf():
    leaves = {name: torch.randn(3, 3, requires_grad=True) for name in "ab"}
    leaves["c"] = leaves["a"]
    output = (leaves["a"] @ leaves["b"]).square().sum()
    expected = dict(zip("abc", torch.autograd.grad(output, list(leaves.values()), retain_graph=True), strict=True))
    seen = {}

    def see(name, gradient):
        seen[name] = gradient.clone()
        gradient.zero_()

    backward(output, leaves, see)
    assert seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)
    assert all(leaf.grad is None and not leaf._post_accumulate_grad_hooks for leaf in leaves.values())


def test_pruned_positions_get_a_gradient(trial):
    for name, gradient in trial.gradients(trial.masks).items():
        assert (gradient[~trial.masks[name]] > 0).any()


def test_the_error_is_the_mean_over_samples_tokens_and_channels(trial):
    sparse = {name: linear.weight.data * trial.masks[name] for name, linear in trial.linears.items()}
    errors = [sample_error(trial, sparse, x, y) for x, y in zip(trial.inputs, trial.targets, strict=True)]
    assert trial.error(trial.masks) == pytest.approx(sum(errors) / 3, rel=1e-12)
    assert trial.error_on_every(2, copied(trial.masks)) == pytest.approx((errors[0] + errors[2]) / 2, rel=1e-12)


def test_the_gradient_pass_measures_the_same_error(trial):
    trial.gradients(trial.masks, "sparse")
    passes = trial.forward_passes
    on_the_way = trial.error(trial.masks)
    assert trial.forward_passes == passes
    assert on_the_way == trial.error(copied(trial.masks)) and trial.forward_passes == passes + 1


def copied(masks):
    """Other tensors with the same values."""
    return {name: keep.clone() for name, keep in masks.items()}


def test_an_error_is_measured_once_for_the_same_tensors_as_long_as_nothing_is_written_to_them(trial):
    first = trial.error(trial.masks)
    assert trial.error(dict(trial.masks)) == first and trial.forward_passes == 1
    trial.masks["down"][0] = False
    assert trial.error(trial.masks) != first and trial.forward_passes == 2
    trial.use_values({"up": trial.weight("up") * 2})
    trial.error(trial.masks)
    assert trial.forward_passes == 3


def test_weights_are_dense_again_after_every_question(trial):
    before = {name: linear.weight.clone() for name, linear in trial.linears.items()}
    trial.gradients(trial.masks, "dense")
    trial.error(copied(trial.masks))
    for name, linear in trial.linears.items():
        assert torch.equal(linear.weight, before[name])


def test_commit_leaves_exact_zeros_and_dense_values(trial):
    before = {name: linear.weight.clone() for name, linear in trial.linears.items()}
    trial.commit()
    for name, linear in trial.linears.items():
        assert (linear.weight[~trial.masks[name]] == 0).all()
        assert torch.equal(linear.weight[trial.masks[name]], before[name][trial.masks[name]])


def test_grown_weights_are_dense_where_a_producer_updated_the_kept(trial):
    first = trial.masks["up"]
    dense = trial.weight("up").clone()
    trial.updated["up"] = torch.where(first, dense + 1, dense)
    grown = torch.ones_like(first)
    assert torch.equal(trial.weight("up", grown)[~first], dense[~first])
    assert torch.equal(trial.weight("up", grown)[first], dense[first] + 1)


@pytest.mark.parametrize("metric", ["weight_gradient", "weight", "gradient"])
def test_importance_equals_its_definition(metric):
    weight, gradient = torch.randn(3, 4), torch.rand(3, 4)
    expected = {"weight_gradient": weight.abs() * gradient, "weight": weight.abs(), "gradient": gradient}[metric]
    assert torch.equal(importance(weight, gradient.clone(), metric), expected)


def test_masks_that_nobody_holds_any_more_leave_no_memory_behind(trial):
    tried = copied(trial.masks)
    tried_error, masks = trial.error(tried), [ref(mask) for mask in tried.values()]
    assert trial.error(tried) == tried_error
    del tried
    gc.collect()
    assert [mask() for mask in masks] == [None] * len(masks)
    before = trial.forward_passes
    assert trial.error(copied(trial.masks)) == tried_error and trial.forward_passes > before
