"""Values of kept weights against the normal equations, row by row in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_barber.tensors.least_squares import solve

from .test_swaps import case, row_error


def run(inputs, targets, values, keep, iterations):
    residual = targets - inputs @ (values * keep).t()
    return solve(values, keep, inputs.t() @ inputs, residual.t() @ inputs, iterations)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_enough_iterations_solve_the_normal_equations(seed):
    inputs, targets, values, keep = case(seed, tokens=30)
    solved = run(inputs, targets, values, keep, 60)
    gram = inputs.t() @ inputs
    for r in range(len(values)):
        kept = keep[r].nonzero().flatten()
        matrix = gram[kept][:, kept]
        right = (inputs.t() @ (targets[:, r] - inputs @ (values[r] * keep[r])))[kept]
        expected = values[r].clone()
        expected[kept] += torch.linalg.solve(matrix, right)
        assert torch.allclose(solved[r], expected, rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 2**31), iterations=st.integers(0, 8))
@settings(max_examples=20, deadline=None)
def test_more_iterations_never_raise_an_error(seed, iterations):
    inputs, targets, values, keep = case(seed)
    fewer = run(inputs, targets, values, keep, iterations)
    more = run(inputs, targets, values, keep, iterations + 1)
    for r in range(len(values)):
        before, after = (row_error(inputs, targets[:, r], v[r], keep[r]) for v in (fewer, more))
        assert after <= before * (1 + 1e-6) + 1e-7


def test_pruned_positions_and_dead_inputs_keep_their_values():
    inputs, targets, values, keep = case(1)
    inputs[:, 4] = 0.0
    solved = run(inputs, targets, values, keep, 20)
    assert torch.equal(solved[~keep], values[~keep])
    assert torch.equal(solved[:, 4], values[:, 4])
    assert torch.isfinite(solved).all()


def test_a_row_at_its_solution_stays():
    inputs, _, values, keep = case(2)
    targets = inputs @ (values * keep).t()
    assert torch.allclose(run(inputs, targets, values, keep, 10), values)
