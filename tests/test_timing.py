"""The passes of the forecast are those that torch counts in a real run; the time is said on one line."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optimum_barber.models.loading import resolve_model
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.allocations import ALLOCATIONS
from optimum_barber.prune.cost import forecast as module
from optimum_barber.prune.cost.forecast import COSTS, EVERY_RUN, forecast, forward_flops, layer_rate, spelled, work_of
from optimum_barber.prune.inspection import inspect_model
from optimum_barber.prune.pipeline import Plan, prune
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.prune.rebuilders import REBUILDERS, chain_of
from optimum_barber.prune.reconstructions import RECONSTRUCTIONS, reconstructions_of
from optimum_barber.prune.settings import BarberConfig

from .conftest import FAMILIES, tiny_model, tiny_windows

WIDE = {"hidden_size": 64, "intermediate_size": 160}  # wide enough for products to be most of the FLOP


def config_of(**settings):
    if "pattern" not in settings:
        settings = {"sparsity": 0.5, **settings}
    return BarberConfig(**settings)


def counted_passes(config, windows):
    """Forward passes whose FLOP torch counts in a run; those of exchanges and solvers are counted as sweeps."""
    source = ModelSource(tiny_model(attn_implementation="eager", **WIDE))
    pattern = config.sparsity_pattern()
    config = config.under(pattern)
    plan = Plan(
        PRODUCERS[config.producer_name], pattern, rebuilders=chain_of(config.rebuild),
        reconstructions=reconstructions_of(config.reconstruct), relative_error=config.rebuild.error == "relative",
    )  # fmt: skip
    source.begin(windows)  # records how layers are called, which runs the first of them once
    special = {torch.ops.aten.baddbmm: lambda *_, **__: 0}
    with FlopCounterMode(display=False, custom_mapping=special) as counter:
        prune(source, windows, plan)
    samples, length = windows.shape
    return counter.get_total_flops() / (samples * forward_flops(source, length))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pattern": "2:4"},
        {"rebuild": "none"},
        {"rebuild": "swaps"},
        {"rebuild": {"method": "barber", "rounds": 3}},
        {"rebuild": "gauss-newton"},
        {"rebuild": "dsnot"},
        {"rebuild": "none", "reconstruct": "gradient"},
    ],
    ids=str,
)
def test_the_passes_of_a_run_are_about_those_that_torch_counts(settings):
    config = config_of(**settings)
    passes = work_of(config, config.sparsity_pattern(), 16)[0]
    assert 1 / 1.5 < counted_passes(config, tiny_windows(samples=16, length=64)) / passes < 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_is_that_of_the_model_with_weights(family):
    model = tiny_model(family, attn_implementation="eager")
    base = getattr(model, model.base_model_prefix)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        base(tiny_windows(samples=1), use_cache=False)
    assert forward_flops(ModelSource(tiny_model(family)), 16) == counter.get_total_flops() > 0


def test_a_model_that_cannot_run_without_weights_counts_by_its_linears(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no weights")

    source = ModelSource(tiny_model())
    monkeypatch.setattr("transformers.LlamaModel.forward", refuse)
    assert forward_flops(source, 16) == 2 * 16 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)


def test_the_table_names_every_method_that_comes_with_the_package():
    for registry in (PRODUCERS, REBUILDERS, RECONSTRUCTIONS, ALLOCATIONS):
        own = [offer.name for offer in registry.offers() if offer.package == "built-in"]
        assert own and set(own) <= COSTS.keys()


def seconds_of(monkeypatch, source, config, windows):
    """The seconds of a forecast on a machine of 1 MFLOP a second."""
    monkeypatch.setattr(module, "layer_rate", lambda *_: 1e6)
    monkeypatch.setattr(module, "spelled", repr)
    line = forecast(source, config, config.sparsity_pattern(), *windows)
    return float(re.search(r"\d+\.\d+", line)[0])


def test_the_forecast_grows_with_samples_layers_and_work(monkeypatch):
    def of(layers=2, windows=(8, 16), **settings):
        source = ModelSource(tiny_model(num_hidden_layers=layers))
        return seconds_of(monkeypatch, source, config_of(**settings), windows)

    assert of(layers=4) == pytest.approx(2 * of())
    one_pass = 8 * forward_flops(ModelSource(tiny_model()), 16) / 1e6
    more = of(windows=(16, 16), rebuild="none") - of(rebuild="none")
    assert more == pytest.approx(EVERY_RUN.passes * one_pass)
    assert of(rebuild="none") < of(rebuild="swaps") < of() < of(pattern="2:4")
    assert of(rebuild={"method": "barber", "rounds": 1}) < of(rebuild={"method": "barber", "rounds": 4})


def test_auto_is_forecast_as_what_it_means_under_the_pattern():
    grouped, named = config_of(pattern="2:4"), config_of(pattern="2:4", rebuild="swaps+gauss-newton")
    assert work_of(grouped, grouped.sparsity_pattern(), 8) == work_of(named, named.sparsity_pattern(), 8)
    free, named = config_of(), config_of(rebuild="barber+swaps")
    assert work_of(free, free.sparsity_pattern(), 8) == work_of(named, named.sparsity_pattern(), 8)


def test_the_time_of_a_plug_in_is_said_to_be_missing():
    config = config_of(rebuild="sorcery+swaps")
    line = forecast(ModelSource(tiny_model()), config, config.sparsity_pattern(), 4, 16)
    assert line.startswith("time          ") and line.endswith("; not included, as unknown: sorcery")


def test_times_in_words():
    assert [spelled(seconds) for seconds in (0.2, 42, 600, 100_000)] == [
        "a few seconds",
        *(f"about {words}, within a factor of 1.5" for words in ("42 seconds", "10 minutes", "28 hours")),
    ]


def test_the_rate_of_a_layer_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    assert 0 < layer_rate([torch.empty(32, 16, device="meta")], 8, torch.device("cpu")) < float("inf")
    assert torch.equal(before, torch.get_rng_state())


def test_inspect_says_how_long_a_default_run_takes(model_dir):
    assert "\ntime          a few seconds" in inspect_model(resolve_model(str(model_dir)), 4, 16)
