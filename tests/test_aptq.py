"""APTQ: Hessians by attention's output against explicit Jacobians, and bits shared out by sensitivity."""

import json
from dataclasses import replace

import pytest
import torch

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.integrations.quantization.attention import (
    attention_statistics,
    mean_bits,
    mixed_bits,
    sensitivities,
    structure_of,
)
from optimum_barber.integrations.quantization.quantize import quantize_model
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.source import ModelSource
from optimum_barber.shrink.scan import dense_pass
from optimum_barber.text.windows import TokenWindows

from .conftest import tiny_model, tiny_windows
from .test_quantized_checkpoint import prune

WINDOWS = TokenWindows(tiny_windows(), "tokens", "calibration", 4)
LENGTH = 5


def exact_gram(model, window, name):
    """Sum over tokens of c_t x_t x_t^T, c_t = mean over rows of |dF / dy_t|^2, out of the whole Jacobian."""
    attention = model.model.layers[0].self_attn
    linear, seen = getattr(attention, name), {}

    def replaced(_, args, output):
        seen["x"], seen["y"] = args[0].detach()[0], output.detach().requires_grad_()
        return seen["y"]

    handles = [
        linear.register_forward_hook(replaced),
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    ]
    model(window)
    for handle in handles:
        handle.remove()
    squares = torch.zeros_like(seen["y"])
    for entry in seen["heads"].flatten():
        (slope,) = torch.autograd.grad(entry, seen["y"], retain_graph=True, allow_unused=True)
        squares += 0 if slope is None else slope.square()
    gram = torch.zeros(seen["x"].shape[1], seen["x"].shape[1])
    for x, square in zip(seen["x"], squares[0], strict=True):
        gram += square.mean() * torch.outer(x, x)
    return gram


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
    bits = mixed_bits(SENSITIVITY, SIZES, average)
    assert bits == expected and mean_bits(bits, SIZES) <= average


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


def test_settings_that_do_not_go_together_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="average_bits 3 goes with method aptq, not with gptq"):
        QuantizeSettings(average_bits=3)
    with pytest.raises(ValueError, match="average_bits excludes bits and bits_of"):
        QuantizeSettings(method="aptq", average_bits=3, bits=4)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        QuantizeSettings(method="aptq", average_bits=1.5)
    source = prune(tmp_path / "source", tokenizer)
    unknown = QuantizeSettings(group_size=16, bits_of={"*.w1": 8})
    with pytest.raises(BarberError, match=r"bits_of '\*\.w1' matches no Linear"):
        quantize_model(source, tmp_path / "out", unknown, WINDOWS, quiet=True)


def test_a_family_whose_attention_is_unknown_is_refused(monkeypatch):
    source = ModelSource(tiny_model())
    known = structure_of(source)
    assert known.output == "self_attn.o_proj"
    monkeypatch.setattr(
        "optimum_barber.integrations.quantization.attention.architecture_of",
        lambda model: replace(source.architecture, structure=None),
    )
    with pytest.raises(BarberError, match="method 'aptq' does not know the attention of llama"):
        structure_of(source)
