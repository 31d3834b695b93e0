"""Names: registered once, found by entry point, answered with neighbours; and how little an extension takes."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
import transformers

from optimum_barber import registry
from optimum_barber.architectures import ARCHITECTURES, Architecture
from optimum_barber.config import BarberConfig
from optimum_barber.errors import BarberError
from optimum_barber.masks import keep_highest
from optimum_barber.producers import PRODUCERS, producer
from optimum_barber.registry import Registry
from optimum_barber.sparsifier import BarberSparsifier

from .conftest import SIZES, tiny_model, tiny_windows


def test_duplicates_are_refused_and_the_decorator_returns_its_object():
    names = Registry("thing")

    @names.register("one")
    def one():
        return 1

    assert one() == 1
    assert names["one"] is one
    with pytest.raises(ValueError, match="'one' is registered already, by tests.test_registry"):
        names.add("one", one)
    assert dict(names) == {"one": one}


def test_an_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(BarberError, match="unknown producer 'wandaa': did you mean 'wanda'.*known are existing, magni"):
        PRODUCERS["wandaa"]


def test_entry_points_are_loaded_when_asked_for_and_their_errors_pass_through(monkeypatch, tmp_path):
    (tmp_path / "good_plugin.py").write_text("LOADED = True\nthing = 42\n")
    (tmp_path / "bad_plugin.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("good", "good_plugin:thing", "things"), EntryPoint("bad", "bad_plugin:thing", "things")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    names = Registry("thing", "things")
    assert list(names) == ["bad", "good"]
    assert "good_plugin" not in sys.modules
    assert names["good"] == 42
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        names["bad"]


def test_a_new_producer_is_one_short_function():
    """The example of CONTRIBUTING.md."""

    @producer("ria-like", needs=["input_norm"])
    def relative_importance(linear, *, power: float = 0.5):
        weight = linear.weight.abs()
        relative = weight / weight.sum(0, keepdim=True) + weight / weight.sum(1, keepdim=True)
        return keep_highest(relative * linear.statistics.input_norm**power, linear.pattern)

    try:
        config = BarberConfig(producer="ria-like", producer_args={"power": "0.25"}, sparsity=0.5)
        result = BarberSparsifier(tiny_model()).sparsify(config, calibration=tiny_windows(), quiet=True)
        assert result.sparsity_config.sparsity == 0.5
        assert result.sparsity_config.producer == {"name": "ria-like", "arguments": {"power": "0.25"}}
    finally:
        del PRODUCERS._items["ria-like"]


def test_a_new_architecture_is_one_table_row():
    """The example of CONTRIBUTING.md."""
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    model = transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes, num_key_value_heads=4)).eval()
    ARCHITECTURES.add("stablelm", Architecture(attention=("self_attn",), mlp=("mlp",), stack="model.layers"))
    try:
        config = BarberConfig(producer="magnitude", pattern="2:4", rebuild="none")
        result = BarberSparsifier(model).sparsify(config, calibration=tiny_windows(), quiet=True)
        assert len(result.masks) == 14
    finally:
        del ARCHITECTURES._items["stablelm"]


def test_a_plain_callable_works_through_the_api():
    def positive_half(linear):
        return keep_highest(linear.weight, linear.pattern)

    config = BarberConfig(producer=positive_half, sparsity=0.5, rebuild="none")
    result = BarberSparsifier(tiny_model()).sparsify(config, calibration=tiny_windows(), quiet=True)
    assert "positive_half" in result.sparsity_config.producer["name"]
    keep = next(iter(result.masks.values())).unpack()
    weight = tiny_model().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(keep, keep_highest(weight, config.sparsity_pattern()))
