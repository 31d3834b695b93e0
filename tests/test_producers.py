"""Every producer against its definition in float64 loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber.base.errors import BarberError
from optimum_barber.base.fields import parse_arguments
from optimum_barber.checkpoints.record import write_masks
from optimum_barber.prune.producers import PRODUCERS, LinearInput, as_producer, producer
from optimum_barber.prune.producers.sparsegpt import inverse_factor
from optimum_barber.tensors.input_statistics import InputRecorder, InputStatistics
from optimum_barber.tensors.masks import PackedMask
from optimum_barber.tensors.patterns import SparsityPattern

from . import oracles

PATTERNS = st.sampled_from([SparsityPattern(0.5), SparsityPattern(0.7), SparsityPattern(0.5, 2, 4)])


def linear_input(pattern, rows=3, columns=8, tokens=20, seed=0, name="layer.up"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return LinearInput(name, weight, pattern, InputStatistics(x.norm(dim=0), x.t() @ x, tokens), seed), x


def expected_keep(scores, pattern, scope):
    """The producer's mask, from a nested list of scores."""
    keep = [[True] * len(row) for row in scores]
    if pattern.semi_structured:
        for i, row in enumerate(scores):
            for start in range(0, len(row), pattern.group):
                for j in oracles.lowest_pruned(row[start : start + pattern.group], pattern.group - pattern.keep):
                    keep[i][start + j] = False
        return keep
    flat = [score for row in scores for score in row]
    if scope == "layer":
        for index in oracles.lowest_pruned(flat, oracles.share(pattern.sparsity, len(flat))):
            keep[index // len(scores[0])][index % len(scores[0])] = False
    else:
        for i, row in enumerate(scores):
            for j in oracles.lowest_pruned(row, oracles.share(pattern.sparsity, len(row))):
                keep[i][j] = False
    return keep


@given(pattern=PATTERNS, seed=st.integers(0, 10**6), scope=st.sampled_from(["layer", "row"]))
def test_magnitude(pattern, seed, scope):
    given_input, _ = linear_input(pattern, seed=seed)
    scores = [[abs(w) for w in row] for row in given_input.weight.tolist()]
    keep = PRODUCERS["magnitude"].function(given_input, scope=scope)
    assert keep.tolist() == expected_keep(scores, pattern, scope)


@given(pattern=PATTERNS, seed=st.integers(0, 10**6))
def test_wanda(pattern, seed):
    given_input, x = linear_input(pattern, seed=seed)
    norms = [sum(v * v for v in column) ** 0.5 for column in x.double().t().tolist()]
    scores = [[abs(w) * norms[j] for j, w in enumerate(row)] for row in given_input.weight.double().tolist()]
    assert PRODUCERS["wanda"].function(given_input).tolist() == expected_keep(scores, pattern, "row")


@given(seed=st.integers(0, 10**6), n_of_m=st.sampled_from([None, (2, 4)]), block_size=st.sampled_from([3, 4, 128]))
def test_sparsegpt(seed, n_of_m, block_size):
    pattern = SparsityPattern(0.5, *(n_of_m or ()))
    if n_of_m and block_size % n_of_m[1]:
        block_size = 4
    given_input, _ = linear_input(pattern, seed=seed)
    given_input.statistics.gram[2] = given_input.statistics.gram[:, 2] = 0  # a dead channel
    keep, weight = oracles.sparsegpt(given_input.weight, given_input.statistics.gram, 0.5, 0.01, block_size, n_of_m)
    produced = PRODUCERS["sparsegpt"].function(given_input, block_size=block_size)
    assert torch.equal(produced.keep, keep)
    torch.testing.assert_close(produced.weight * keep, (weight * keep).float(), rtol=1e-4, atol=1e-4)
    assert PRODUCERS["sparsegpt"].function(given_input, block_size=block_size, update=False).weight is None


def test_sparsegpt_raises_damping_step_by_step(caplog):
    singular = torch.full((4, 4), -1e-3)
    singular.fill_diagonal_(1e-3)
    inverse_factor(singular, 0.1, "layer.up")
    assert "Cholesky failed for layer.up at damping 0.1; trying 1" in caplog.text


def test_sparsegpt_fails_clearly_in_the_end():
    with pytest.raises(BarberError, match="Cholesky fails for layer.up"):
        inverse_factor(-torch.eye(3), 0.01, "layer.up")


def test_random_masks_depend_on_seed_and_name_only():
    made = PRODUCERS["random"].function
    one, _ = linear_input(SparsityPattern(0.5), rows=16, columns=16)
    again, _ = linear_input(SparsityPattern(0.5), rows=16, columns=16)
    other, _ = linear_input(SparsityPattern(0.5), rows=16, columns=16, name="layer.down")
    assert torch.equal(made(one), made(again))
    assert not torch.equal(made(one), made(other))
    assert (made(one).sum(1) == 8).all()


def test_masks_come_back_from_a_file(tmp_path):
    given_input, _ = linear_input(SparsityPattern(0.5))
    keep = PRODUCERS["magnitude"].function(given_input)
    path = str(tmp_path / "masks.safetensors")
    write_masks(path, {"layer.up": PackedMask.pack(keep)}, "unstructured")
    entry = PRODUCERS["masks"]
    assert entry.brings_pattern({"layer.up": (3, 8)}, masks=path).sparsity == 0.5
    assert torch.equal(entry.function(given_input, masks=path), keep)
    with pytest.raises(BarberError, match="has no module layer.down"):
        entry.brings_pattern({"layer.up": (3, 8), "layer.down": (3, 8)}, masks=path)
    with pytest.raises(BarberError, match=r"has shape \(3, 8\), the model's is \(3, 12\)"):
        entry.brings_pattern({"layer.up": (3, 12)}, masks=path)


def test_arguments_are_typed_and_checked():
    entry = PRODUCERS["sparsegpt"]
    assert parse_arguments(entry.function, "sparsegpt", {"damping": "0.05", "update": "false"}) == {
        "damping": 0.05,
        "update": False,
    }
    with pytest.raises(BarberError, match="takes no argument 'dampling': it takes damping, block_size, update"):
        parse_arguments(entry.function, "sparsegpt", {"dampling": "1"})
    with pytest.raises(BarberError, match="damping=x of producer 'sparsegpt' is no float"):
        parse_arguments(entry.function, "sparsegpt", {"damping": "x"})


def test_a_plain_callable_is_a_producer_and_unknown_needs_are_refused():
    def by_sign(linear):
        return linear.weight > 0

    by_sign.needs = ("gram",)
    assert as_producer(by_sign).needs == {"gram"}
    with pytest.raises(BarberError, match="unknown statistics"):
        producer("nobody", needs=["hessian"])


def test_statistics_are_sums_over_all_tokens_and_shared_between_linears():
    torch.manual_seed(0)
    up, gate = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    samples = [torch.randn(1, 5, 4) for _ in range(3)]
    with InputRecorder({"up": up, "gate": gate}, frozenset(["input_norm", "gram"])) as recorder:
        for x in samples:
            up(x), gate(x)
    up(samples[0])  # too late to count
    actual = recorder.result()
    x = torch.cat(samples, 1)[0].double()
    torch.testing.assert_close(actual["up"].input_norm.double(), x.norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(actual["up"].gram.double(), x.t() @ x, rtol=1e-5, atol=1e-6)
    assert actual["up"].tokens == 15
    assert actual["gate"].gram is actual["up"].gram


def test_statistics_that_nobody_asked_for_cost_nothing():
    up = torch.nn.Linear(4, 3)
    with InputRecorder({"up": up}, frozenset()) as recorder:
        assert not up._forward_pre_hooks
    assert recorder.result()["up"].input_norm is None


def saved(directory, weight):
    """A checkpoint of one Linear."""
    from safetensors.torch import save_file

    (directory / "config.json").touch()
    save_file({"layer.up.weight": weight}, directory / "model.safetensors")
    return str(directory)


@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (8, 16), (16, 32)])
def test_zeros_of_another_tool_are_read_with_their_pattern(tmp_path, n_of_m):
    entry, pattern = PRODUCERS["existing"], SparsityPattern.parse("{}:{}".format(*n_of_m), None)
    given_input, _ = linear_input(pattern, rows=64, columns=64)
    keep = PRODUCERS["wanda"].function(given_input)
    sparse = given_input.weight * keep
    sparse[0, int(keep[0].nonzero()[0])] = 0  # a kept weight that happens to be zero
    directory = saved(tmp_path, sparse)
    assert entry.brings_pattern({"layer.up": (64, 64)}, sparse_model=directory) == pattern
    read = entry.function(given_input, sparse_model=directory, keep_weights=True)
    assert (read.keep.reshape(-1, n_of_m[1]).sum(1) == n_of_m[0]).all()
    assert torch.equal(read.weight, sparse)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
def test_unstructured_zeros_are_never_taken_for_a_pattern(tmp_path, sparsity):
    entry = PRODUCERS["existing"]
    given_input, _ = linear_input(SparsityPattern(sparsity), rows=64, columns=64)
    keep = PRODUCERS["wanda"].function(given_input)
    directory = saved(tmp_path, given_input.weight * keep)
    actual = entry.brings_pattern({"layer.up": (64, 64)}, sparse_model=directory)
    assert (actual.semi_structured, actual.sparsity) == (False, float((~keep).float().mean()))
    assert torch.equal(entry.function(given_input, sparse_model=directory).keep, keep)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    entry = PRODUCERS["existing"]
    directory = saved(tmp_path, torch.ones(8, 8))
    with pytest.raises(BarberError, match="has 0 zeros in 64 weights"):
        entry.brings_pattern({"layer.up": (8, 8)}, sparse_model=directory)
    with pytest.raises(BarberError, match=r"layer.up has shape \(8, 8\), the model's is \(8, 4\)"):
        entry.brings_pattern({"layer.up": (8, 4)}, sparse_model=directory)
    with pytest.raises(BarberError, match="has no weight layer.down.weight"):
        entry.brings_pattern({"layer.down": (8, 8)}, sparse_model=directory)
    given_input, _ = linear_input(SparsityPattern(0.5, 2, 4), rows=8)
    with pytest.raises(BarberError, match="layer.up does not hold the pattern 2:4"):
        entry.function(given_input, sparse_model=directory)
