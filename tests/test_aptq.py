"""APTQ: Hessians by attention's output against explicit Jacobians, and bits shared out by sensitivity."""

import json
from dataclasses import replace

import pytest
import torch

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.record import read_record
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.cli import main
from optimum_barber.integrations.quantization.attention import (
    attention_statistics,
    fused_units,
    mean_bits,
    mixed_bits,
    sensitivities,
    structure_of,
)
from optimum_barber.integrations.quantization.quantize import quantize_model
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.linears import linear_shapes
from optimum_barber.models.source import ModelSource
from optimum_barber.runs.recipe import run_recipe
from optimum_barber.shrink.scan import dense_pass
from optimum_barber.text.windows import TokenWindows

from .conftest import tiny_model, tiny_windows
from .test_quantized_checkpoint import prune

WINDOWS = TokenWindows(tiny_windows(), "tokens", "calibration", 4)
LENGTH = 5


def exact_gram(model, window, name):
    """Mean over the rows w of the sum over the entries f of F of (df / dw)^T (df / dw), out of the whole Jacobian."""
    attention = model.model.layers[0].self_attn
    weight, seen = getattr(attention, name).weight.requires_grad_(), []
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(window)
    handle.remove()
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for entry in seen[0].flatten():
        (slope,) = torch.autograd.grad(entry, weight, retain_graph=True)
        for row in slope.double():
            gram += torch.outer(row, row) / len(slope)
    weight.requires_grad_(False)
    return gram.float()


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_hessians_are_on_average_those_of_the_jacobian(name):
    model = tiny_model(num_hidden_layers=1).requires_grad_(False)
    window = tiny_windows(1, LENGTH)
    expected = exact_gram(model, window, name)
    draws = 600  # of the signs, one a window
    source = ModelSource(model)
    with torch.no_grad():
        layer, _, trial = next(dense_pass(source, window.expand(draws, -1), frozenset({"input_norm"})))
        statistics = attention_statistics(structure_of(source), layer, trial)
    made = statistics[f"model.layers.0.self_attn.{name}"]
    assert made.tokens == draws * LENGTH
    assert (made.gram / draws - expected).norm() < 0.1 * expected.norm()


def test_blocks_without_attention_have_no_own_statistics():
    source = ModelSource(tiny_model(num_hidden_layers=1))
    with torch.no_grad():
        passes = list(dense_pass(source, tiny_windows(2, LENGTH), frozenset({"input_norm"})))
        assert attention_statistics(structure_of(source), passes[1][0], passes[1][2]) == {}


def test_sensitivities_are_mean_traces():
    model = tiny_model()
    traces = sensitivities(ModelSource(model), WINDOWS.tokens, quiet=True)
    assert len(traces) == 14 and min(traces.values()) > 0
    inputs = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].double()))
    with torch.no_grad():
        for window in WINDOWS.tokens.split(1):
            model(window)
    squares = sum(float((x * x).sum()) for x in inputs)
    width, tokens = inputs[0].shape[1], sum(len(x) for x in inputs)
    assert traces["model.layers.1.mlp.down_proj"] == pytest.approx(2 * squares / (width * tokens), rel=1e-4)
    again = sensitivities(ModelSource(model), WINDOWS.tokens, quiet=True)
    assert again == traces


SIZES = {"a": 10, "b": 20, "c": 30, "d": 40}
SENSITIVITY = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0}


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (2, {"a": 2, "b": 2, "c": 2, "d": 2}),
        (3, {"a": 2, "b": 4, "c": 4, "d": 2}),
        (3.25, {"a": 4, "b": 4, "c": 4, "d": 2}),  # d does not fit, a does
        (4, {"a": 4, "b": 4, "c": 4, "d": 4}),
        (6, {"a": 4, "b": 8, "c": 8, "d": 4}),
        (8, {"a": 8, "b": 8, "c": 8, "d": 8}),
    ],
)
def test_the_most_sensitive_get_more_bits_as_far_as_they_fit(average, expected):
    alone = [[name] for name in SIZES]
    bits = mixed_bits(alone, SENSITIVITY, SIZES, average, QuantizeSettings(method="aptq", average_bits=average).widths)
    assert bits == expected and mean_bits(bits, SIZES) <= average


def test_units_get_the_same_bits_by_the_mean_of_their_weights():
    assert mixed_bits([["a", "d"], ["b"], ["c"]], SENSITIVITY, SIZES, 3, (2, 4)) == {"a": 2, "b": 4, "c": 4, "d": 2}
    assert mixed_bits([["a", "b"], ["c", "d"]], SENSITIVITY, SIZES, 3.4, (2, 4)) == {"a": 4, "b": 4, "c": 2, "d": 2}


def test_what_runtimes_fuse_is_a_unit():
    source = ModelSource(tiny_model())
    units = fused_units(structure_of(source), list(linear_shapes(source)))
    assert sorted(map(len, units)) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"] in units
    assert [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")] in units
    fused = ModelSource(tiny_model("phi3"))
    assert all(len(unit) == 1 for unit in fused_units(structure_of(fused), list(linear_shapes(fused))))


@pytest.mark.parametrize("average", [3, 4, 5.5])
def test_an_average_is_kept_and_no_zero_is_lost(average, tmp_path, tokenizer):
    source = prune(tmp_path / "source", tokenizer, pattern="2:4")
    settings = QuantizeSettings(method="aptq", average_bits=average, group_size=16)
    figures = quantize_model(source, tmp_path / "out", settings, WINDOWS, quiet=True)
    assert average - 0.5 < figures["bits"] <= average
    outcome = verify_checkpoint(tmp_path / "out")
    assert outcome.faults == [] and outcome.zeros == outcome.pruned > 0
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == (1 if average == 4 else 2)
    (step,) = read_record(tmp_path / "out").steps
    assert step["mean_bits"] == figures["bits"] and "bits" not in step


def test_a_recipe_mixes_bits(tmp_path, model_dir):
    stages = [{"quantize": {"method": "aptq", "average_bits": 3, "group_size": 16}}]
    recipe = {"name": "mixed", "model": str(model_dir), "stages": stages, "output": str(tmp_path / "run")}
    recipe |= {"calibration": {"texts": ["pydoc"], "samples": 2, "sequence_length": 16}, "dtype": "bfloat16"}
    (tmp_path / "mixed.json").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "mixed.json"), "--quiet"]) == 0
    config = json.loads((tmp_path / "run" / "01-quantize" / "model" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert config["dtype"] == "bfloat16" and [group["weights"]["num_bits"] for group in groups] == [2, 4]
    recipe["stages"][0]["quantize"]["bits"] = 4
    (tmp_path / "mixed.json").write_text(json.dumps(recipe))
    with pytest.raises(BarberError, match="average_bits 3 excludes bits and bits_of"):
        run_recipe(tmp_path / "mixed.json", quiet=True)


def test_settings_that_do_not_go_together_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="average_bits 3 goes with method aptq, not with gptq"):
        QuantizeSettings(average_bits=3)
    with pytest.raises(ValueError, match="average_bits 3 excludes bits and bits_of"):
        QuantizeSettings(method="aptq", average_bits=3, bits=4)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        QuantizeSettings(method="aptq", average_bits=1.5)
    source = prune(tmp_path / "source", tokenizer)
    unknown = QuantizeSettings(group_size=16, bits_of={"*.w1": 8})
    with pytest.raises(BarberError, match=r"bits_of '\*\.w1' matches no Linear"):
        quantize_model(source, tmp_path / "out", unknown, WINDOWS, quiet=True)
    shadowed = QuantizeSettings(group_size=16, bits_of={"*proj": 2, "*.down_proj": 8})
    with pytest.raises(BarberError, match=r"bits_of '\*\.down_proj' decides nothing: globs before it"):
        quantize_model(source, tmp_path / "out", shadowed, WINDOWS, quiet=True)
    with pytest.raises(ValueError, match="sweeps goes with gptq and aptq, not with round-to-nearest"):
        QuantizeSettings(method="round-to-nearest", sweeps=1)


def test_a_family_whose_attention_is_unknown_is_refused(monkeypatch):
    source = ModelSource(tiny_model())
    known = structure_of(source)
    assert known.output == "self_attn.o_proj"
    monkeypatch.setattr(
        "optimum_barber.integrations.quantization.attention.architecture_of",
        lambda model: replace(source.architecture, structure=None),
    )
    with pytest.raises(BarberError, match="does not know the attention of llama: give gptq, or a model of gemma, "):
        structure_of(source)
