"""Names: registered once, found by entry point, answered with neighbours; and how little an extension takes."""

import sys
from importlib import import_module
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
import transformers

from optimum_barber import __version__
from optimum_barber.base import registry
from optimum_barber.base.errors import BarberError
from optimum_barber.base.moved import MOVED
from optimum_barber.base.registry import PluginError, Registry
from optimum_barber.models.architectures import ARCHITECTURES, Architecture
from optimum_barber.prune.producers import PRODUCERS, producer
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.prune.sparsifier import BarberSparsifier
from optimum_barber.tensors.masks import keep_highest

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


@pytest.fixture
def plugins(monkeypatch, tmp_path):
    """A registry with one item of its own, and a function that puts modules and entry points before it."""
    names = Registry("thing", "things")
    names.add("own", print, origin="optimum_barber.somewhere")
    monkeypatch.setitem(sys.modules, "names_of_the_test", SimpleNamespace(names=names))
    monkeypatch.syspath_prepend(tmp_path)

    def offer(modules, **targets):
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)
        points = [EntryPoint(name, value, "things") for name, values in targets.items() for value in values.split()]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        return names

    yield offer
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_entry_points_are_loaded_when_asked_for_and_their_errors_are_chained(plugins):
    modules = {"good_plugin": "def thing(): ...", "bad_plugin": "import no_such_module_at_all"}
    names = plugins(modules, good="good_plugin:thing", bad="bad_plugin:thing")
    assert list(names) == ["bad", "good", "own"]
    assert (len(names), "bad" in names, "worse" in names) == (3, True, False)
    assert "good_plugin" not in sys.modules
    assert names["good"] is sys.modules["good_plugin"].thing
    with pytest.raises(
        PluginError, match="thing 'bad' of bad_plugin:thing cannot be loaded: ModuleNotFoundError"
    ) as bad:
        names["bad"]
    assert isinstance(bad.value.__cause__, ModuleNotFoundError)
    assert names["good"] is sys.modules["good_plugin"].thing


def test_a_module_may_register_its_names_itself_and_a_failed_one_leaves_nothing(plugins):
    both = "from names_of_the_test import names\nnames.add('{0}', abs)\nnames.add('{1}', max)\n"
    modules = {
        "two_plugin": both.format("one", "two"),
        "half_plugin": both.format("red", "blue") + "raise OSError('no')",
    }
    names = plugins(modules, one="two_plugin", two="two_plugin", red="half_plugin", blue="half_plugin")
    assert (names["one"], names["two"]) == (abs, max)
    for name in ("red", "blue"):
        with pytest.raises(PluginError, match=f"'{name}' of half_plugin cannot be loaded: OSError: no"):
            names[name]
    packages = {offer.name: offer.package for offer in names.offers()}
    assert packages == dict(blue="half_plugin", one="two_plugin", own="built-in", red="half_plugin", two="two_plugin")


def test_a_name_that_two_packages_offer_is_refused_and_a_built_in_stays_what_it_is(plugins, caplog):
    text = "def thing(): ..."
    modules = {"first_plugin": text, "second_plugin": text}
    names = plugins(modules, same="first_plugin:thing second_plugin:thing", own="first_plugin:thing")
    with pytest.raises(PluginError, match="'same' of first_plugin:thing clashes with second_plugin:thing: one of them"):
        names["same"]
    assert names["own"] is print
    assert caplog.messages == [f"thing 'own' is that of built-in {__version__}; ignored is that of first_plugin:thing"]
    with pytest.raises(PluginError, match="'own' of first_plugin:thing clashes with built-in"):
        names.load(next(offer for offer in names.offers() if offer.name == "own" and offer.point))


def test_an_entry_point_must_name_what_can_be_an_item(plugins):
    names = plugins({"number_plugin": "answer = 42"}, answer="number_plugin:answer", lost="number_plugin:nothing")
    with pytest.raises(PluginError, match="TypeError: its entry point names a value of class int, no thing"):
        names["answer"]
    with pytest.raises(PluginError, match="AttributeError: module 'number_plugin' has no attribute 'nothing'"):
        names["lost"]


def test_a_new_producer_is_one_short_function():
    """The example of CONTRIBUTING.md."""

    def relative_importance(linear, *, power: float = 0.5):
        weight = linear.weight.abs()
        relative = weight / weight.sum(0, keepdim=True) + weight / weight.sum(1, keepdim=True)
        return keep_highest(relative * linear.statistics.input_norm**power, linear.pattern)

    with PRODUCERS.temporarily():
        producer("ria-like", needs=["input_norm"])(relative_importance)
        config = BarberConfig(producer="ria-like", producer_args={"power": "0.25"}, sparsity=0.5)
        result = BarberSparsifier(tiny_model()).sparsify(config, calibration=tiny_windows(), quiet=True)
        assert result.sparsity_config.sparsity == 0.5
        assert result.sparsity_config.producer == {"name": "ria-like", "arguments": {"power": "0.25"}}
    assert "ria-like" not in PRODUCERS


def test_a_new_architecture_is_one_table_row():
    """The example of CONTRIBUTING.md."""
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    model = transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes, num_key_value_heads=4)).eval()
    row = Architecture(attention=("self_attn",), mlp=("mlp",), stack="model.layers")
    with ARCHITECTURES.temporarily({"stablelm": row}):
        config = BarberConfig(producer="magnitude", pattern="2:4", rebuild="none")
        result = BarberSparsifier(model).sparsify(config, calibration=tiny_windows(), quiet=True)
        assert len(result.masks) == 14


def test_a_plain_callable_works_through_the_api():
    def positive_half(linear):
        return keep_highest(linear.weight, linear.pattern)

    config = BarberConfig(producer=positive_half, sparsity=0.5, rebuild="none")
    result = BarberSparsifier(tiny_model()).sparsify(config, calibration=tiny_windows(), quiet=True)
    assert "positive_half" in result.sparsity_config.producer["name"]
    keep = next(iter(result.masks.values())).unpack()
    weight = tiny_model().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(keep, keep_highest(weight, config.sparsity_pattern()))


def test_what_is_registered_temporarily_goes_and_what_it_replaced_comes_back():
    names = Registry("thing")
    names.add("one", 1)
    with names.temporarily({"one": 10, "two": 2}):
        names.add("three", 3)
        assert dict(names) == {"one": 10, "two": 2, "three": 3}
    assert dict(names) == {"one": 1}
    with pytest.raises(KeyError), names.temporarily({"one": 10}):
        raise KeyError
    assert dict(names) == {"one": 1}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_module_name_is_answered_by_the_new_one(old):
    with pytest.raises(ModuleNotFoundError) as error:
        import_module(f"optimum_barber.{old}")
    assert str(error.value) == f"optimum_barber.{old} is optimum_barber.{MOVED[old]} since 0.2.0"
    import_module(f"optimum_barber.{MOVED[old]}")


def test_a_module_that_became_a_package_of_its_name_is_answered_too():
    with pytest.raises(ImportError, match=r"quantization is optimum_barber.integrations.quantization.quantize since"):
        from optimum_barber.integrations.quantization import quantize_model  # noqa: F401


def test_a_module_that_never_was_is_not_answered():
    with pytest.raises(ModuleNotFoundError, match="No module named 'optimum_barber.never'"):
        import_module("optimum_barber.never")
