"""New values for kept weights: never a higher error, never a zero lost; exchanges and chains likewise."""

import math

import pytest
import torch

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.models.activations import Activations
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.quadratic import closing_linear
from optimum_barber.prune.reconstructions import RECONSTRUCTIONS
from optimum_barber.prune.stream import stream_weights

from .conftest import FAMILIES, tiny_model, tiny_windows
from .test_trial import trial  # noqa: F401

CHAINS = ["swaps", "barber+swaps", "swaps+barber+swaps", "barber+swaps+gauss-newton"]
METHODS = ["least-squares", "gradient", "least-squares+gradient"]


def run(model, rebuild="barber+swaps", reconstruct="none", error="absolute", **settings):
    settings = settings or {"sparsity": 0.5}
    config = BarberConfig(
        rebuild={"method": rebuild, "error": error},
        reconstruct={"method": reconstruct, "learning_rate": 1e-3},
        **settings,
    )
    return BarberSparsifier(model).sparsify(config, tiny_windows(samples=9, length=16), quiet=True)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("error", ["absolute", "relative"])
def test_chains_never_raise_the_error_of_a_block(chain, error, settings):
    result = run(tiny_model("llama"), chain, error=error, **settings)
    assert all(block.error_rebuilt <= block.error_before for block in result.reports)
    assert sum(block.swaps for block in result.reports) > 0
    single = run(tiny_model("llama"), "none", **settings)
    assert result.sparsity_config.sparsity == single.sparsity_config.sparsity


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_reconstruction_lowers_the_error_and_keeps_every_zero(family, method):
    model = tiny_model(family)
    result = run(model, reconstruct=method)
    assert all(block.error_after <= block.error_rebuilt for block in result.reports)
    assert sum(block.error_after for block in result.reports) < sum(block.error_rebuilt for block in result.reports)
    for name, mask in result.masks.items():
        assert not model.get_parameter(f"{name}.weight")[~mask.unpack()].any()
    assert result.sparsity_config.reconstruct["method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_two_reconstructions_are_bit_identical(method):
    first, second = tiny_model("llama"), tiny_model("llama")
    run(first, reconstruct=method), run(second, reconstruct=method)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_reconstruction_of_a_single_linear_solves_its_normal_equations(trial):  # noqa: F811
    masks = trial.masks
    config = BarberConfig(sparsity=0.5, reconstruct={"method": "least-squares", "iterations": 50, "shrinkage": 0.0})
    before = trial.error(masks)
    RECONSTRUCTIONS["least-squares"](trial, config.reconstruct)
    assert trial.error(masks) < before
    slopes = trial.gradients(masks, reduction="mean")
    assert float(slopes[closing_linear(trial)][masks["down"]].max()) == pytest.approx(0, abs=1e-9)


def test_values_that_are_not_finite_are_refused_and_said(trial, caplog):  # noqa: F811
    before, weight = trial.error(trial.masks), trial.weight("down", trial.masks["down"]).clone()
    assert not trial.adopt({"down": torch.full_like(weight, math.nan)})
    assert trial.error(trial.masks) == before
    assert torch.equal(trial.weight("down", trial.masks["down"]), weight)
    assert "the weights stay as they were" in caplog.text


def test_an_unknown_reconstruction_names_the_nearest():
    with pytest.raises(BarberError, match="least-squares"):
        run(tiny_model("llama"), reconstruct="least-square")


def test_a_broken_chain_is_refused():
    with pytest.raises(ValueError, match="joined by"):
        BarberConfig(sparsity=0.5, reconstruct="gradient+")


def test_adam_gains_the_same_whatever_the_scale_of_the_error(trial):  # noqa: F811
    config = BarberConfig(sparsity=0.5, reconstruct={"method": "gradient", "learning_rate": 1e-2})
    left = []
    for scale in (1.0, 1e-9):
        trial.use_values({})
        trial.token_weights = Activations([torch.full((1, x.shape[1], 1), scale, dtype=x.dtype) for x in trial.inputs])
        before = trial.error(trial.masks)
        assert RECONSTRUCTIONS["gradient"](trial, config.reconstruct)["accepted"]
        left.append(trial.error(trial.masks) / before)
    assert left[1] == pytest.approx(left[0], rel=1e-3)


def test_always_takes_the_last_masks_of_swaps():
    model = tiny_model("llama")
    config = BarberConfig(sparsity=0.5, rebuild={"method": "swaps", "accept": "always"})
    result = BarberSparsifier(model).sparsify(config, tiny_windows(samples=2, length=4), quiet=True)
    assert all(record["accepted"] for block in result.reports for record in block.rounds)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_relative_errors_weigh_by_the_stream_behind_the_block(family):
    source = ModelSource(tiny_model(family))
    hidden = Activations(source.begin(tiny_windows(samples=2, length=8)))
    layer = next(iter(source.layers()))
    outputs = []
    for block in layer.blocks:
        inputs = [layer.input_of(block, h, list(b)) for h, *b in zip(hidden, *outputs, strict=True)]
        outputs.append(Activations([block(x) for x in inputs]))
    streams = [layer.output(h, list(b)) for h, *b in zip(hidden, *outputs, strict=True)]
    for weights, stream in zip(stream_weights(layer, hidden, outputs), streams, strict=True):
        for token in range(stream.shape[1]):
            power = sum(float(v) ** 2 for v in stream[0, token]) / stream.shape[2]
            assert float(weights[0, token, 0]) == pytest.approx(1 / power, rel=1e-4)
