"""Biases for what the removed units contributed: against sums by hand in float64, and what cannot hold them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_barber import BarberShrinker, ShrinkConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.structure import read_structure
from optimum_barber.cli import main
from optimum_barber.models.source import ModelSource
from optimum_barber.shrink.audit import audit_cut
from optimum_barber.shrink.cut_errors import block_errors, mean_contributions
from optimum_barber.shrink.plan import plan_cut
from optimum_barber.shrink.scan import choose_units

from .conftest import tiny_model, tiny_windows

CASES = [
    ("llama", {"remove": 0.5}),
    ("llama-bias-untied", {"remove": 0.5, "head_unit": "query"}),
    ("qwen3", {"remove_heads": 0.5}),
    ("opt", {"remove": 0.3, "remove_heads": 0}),
]


def chosen(model, windows, **settings):
    config = ShrinkConfig(compensate=True, **settings)
    cut = plan_cut(model, config)
    (kept,) = choose_units(cut.source, windows, [cut])
    return cut, kept


@pytest.mark.parametrize(("family", "settings"), CASES)
@torch.no_grad()
def test_a_bias_is_the_mean_of_what_went(family, settings):
    model, windows = tiny_model(family).double(), tiny_windows(3)
    cut, kept = chosen(model, windows, **settings)
    actual = mean_contributions(ModelSource(model, dtype=torch.float64), windows, kept, cut.units)
    names = {f"{layer}.{u.reader}" for layer, s in kept.items() for k, u in cut.units.items() if len(s[k]) < u.count}
    assert set(actual) == names
    for layer, stays in kept.items():
        for kind, unit in cut.units.items():
            name = f"{layer}.{unit.reader}"
            if name not in actual:
                continue
            reader, inputs = model.get_submodule(name), []
            handle = reader.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            for window in windows.split(1):
                model(window, use_cache=False)
            handle.remove()
            width, expected, tokens = unit.slices[-1].width, [0.0] * reader.out_features, 0
            for x in torch.cat([each.flatten(0, -2) for each in inputs]):
                tokens += 1
                for u in set(range(unit.count)) - set(stays[kind]):
                    for j in range(u * width, (u + 1) * width):
                        for row in range(reader.out_features):
                            expected[row] += float(reader.weight[row, j] * x[j])
            assert torch.allclose(actual[name], torch.tensor(expected, dtype=torch.float64) / tokens, atol=1e-10)
        break  # the loops are slow: one layer will do


@pytest.mark.parametrize(("family", "settings"), CASES)
@torch.no_grad()
def test_the_block_keeps_its_mean_and_its_error_falls(family, settings):
    model, windows = tiny_model(family), tiny_windows(4)
    cut, kept = chosen(model, windows, **settings)
    biases = mean_contributions(cut.source, windows, kept, cut.units)
    plain = block_errors(cut.source, windows, kept, cut.units)
    better = block_errors(cut.source, windows, kept, cut.units, biases)
    for before, after in zip(plain, better, strict=True):
        assert after["error"] < before["error"] or after["error"] == before["error"] == 0
    config = ShrinkConfig(compensate=True, **settings)
    result = BarberShrinker(model).shrink(config, windows, latency=False, quiet=True)
    assert result.report["blocks"] == better
    for name, bias in biases.items():
        reader, old = result.model.get_submodule(name), model.get_submodule(name).bias
        assert torch.allclose(reader.bias.double(), bias + (0 if old is None else old.double()), atol=1e-6)
    zeros = [n for n, p in result.model.named_parameters() if n.endswith("proj.bias") and not p.any()]
    assert not any(n.removesuffix(".bias") in biases for n in zeros)


def test_it_is_written_read_audited_and_replayed(model_dir, tmp_path):
    command = ["shrink", str(model_dir), "--remove", "0.5", "--compensate", "--scorer", "magnitude", "--quiet"]
    text = ["--calibration", "pydoc", "--samples", "4", "--sequence-length", "16", "--no-latency"]
    assert main([*command, *text, "-o", str(tmp_path / "out")]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, True)
    assert model.model.layers[0].mlp.down_proj.bias.any()
    assert not model.model.layers[0].mlp.up_proj.bias.any()
    assert read_structure(tmp_path / "out").settings["compensate"] is True
    audit = audit_cut(tmp_path / "out")
    assert (audit.faults, audit.base) == ([], str(model_dir))
    replay = ["shrink", str(model_dir), "--structure", str(tmp_path / "out"), "--compensate", "--quiet", *text]
    assert main([*replay, "-o", str(tmp_path / "again")]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("mistral", {}, {"remove": 0.5}, "a bias in self_attn.o_proj, which MistralConfig cannot say"),
        ("qwen3", {}, {"remove_channels": 0.5}, "in mlp.down_proj, which Qwen3Config cannot say: .* keep all channels"),
        (
            "llama",
            {"num_attention_heads": 8, "num_key_value_heads": 8},
            {"remove_heads": 0.375},
            "in self_attn.o_proj, which MistralConfig cannot say",
        ),
    ],
)
def test_a_bias_that_the_configuration_cannot_say_is_refused(family, changes, settings, message):
    with pytest.raises(BarberError, match=message):
        plan_cut(tiny_model(family, **changes), ShrinkConfig(compensate=True, **settings))
