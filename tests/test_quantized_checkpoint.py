"""A quantized checkpoint: the masks hold, and it loads anywhere as what was measured, bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_barber.base.errors import BarberError, MissingExtraError
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.integrations.quantization.quantize import (
    ANY_PATTERN,
    MaskedQuantizer,
    fill_dead,
    quantize_blocks,
    quantize_model,
)
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.loading import load_model, resolve_model
from optimum_barber.prune.producers import LinearInput
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.prune.sparsifier import BarberSparsifier
from optimum_barber.tensors.input_statistics import InputStatistics
from optimum_barber.tensors.quantize import IntegerFormat, round_to_nearest
from optimum_barber.text.windows import TokenWindows

from .conftest import tiny_model, tiny_windows

WINDOWS = TokenWindows(tiny_windows(), "tokens", "calibration", 4)
CASES = {
    "llama-4": ("llama", torch.float32, "2:4", {"bits": 4, "group_size": 16}),
    "llama-8": ("llama", torch.bfloat16, None, {"bits": 8, "group_size": -1}),
    "llama-round": ("llama", torch.bfloat16, "2:4", {"bits": 4, "group_size": 8, "method": "round-to-nearest"}),
    "opt-4": ("opt", torch.float16, None, {"bits": 4, "group_size": None}),
    "opt-8": ("opt", torch.bfloat16, None, {"bits": 8, "group_size": 4}),
    "phi3-4": ("phi3", torch.bfloat16, None, {"bits": 4, "group_size": 16}),
    "phi3-8": ("phi3", torch.float32, "2:4", {"bits": 8, "group_size": 2, "method": "round-to-nearest"}),
    "llama-2": ("llama", torch.bfloat16, None, {"bits": 2, "group_size": 8}),
    "llama-mixed": ("llama", torch.bfloat16, "2:4", {"group_size": 16, "bits_of": {"*.down_proj": 8, "*.k_proj": 2}}),
    "llama-aptq": ("llama", torch.float32, "2:4", {"group_size": 16, "method": "aptq", "average_bits": 3}),
    "phi3-aptq": ("phi3", torch.bfloat16, None, {"group_size": 16, "method": "aptq", "average_bits": 5}),
    "opt-aptq": ("opt", torch.float32, None, {"group_size": 16, "method": "aptq"}),
    "dense": ("llama", torch.bfloat16, "dense", {"bits": 4, "group_size": 16}),
}
RELOAD = """
import sys, torch
sys.modules['optimum_barber'] = None
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    logits = model(torch.load(f'{directory}/windows.pt')).logits
    torch.save({'logits': logits, **model.state_dict()}, f'{directory}/reloaded.pt')
"""


def prune(directory, tokenizer, family="llama", dtype=torch.float32, pattern=None):
    """A tiny checkpoint, pruned unless the pattern is 'dense'."""
    model = tiny_model(family).to(dtype)
    if pattern == "dense":
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory
    config = BarberConfig(sparsity=0.5, pattern=pattern, rebuild="none")
    BarberSparsifier(model, tokenizer).sparsify(config, WINDOWS, directory, quiet=True)
    return directory


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tokenizer):
    return prune(tmp_path_factory.mktemp("pruned") / "model", tokenizer)


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """Every case quantized, what it was in memory, and what a process without this package loads."""
    root, cases = tmp_path_factory.mktemp("quantized"), {}
    for name, (family, dtype, pattern, options) in CASES.items():
        source, output = prune(root / f"{name}-source", tokenizer, family, dtype, pattern), root / name
        opened, settings = PrunedModel.load(source), QuantizeSettings(**options)
        quantizer, _ = quantize_blocks(opened, settings, WINDOWS, quiet=True)
        with torch.no_grad():
            memory = {"logits": opened.model(WINDOWS.tokens).logits}
        memory |= {f"{n}.weight": opened.model.get_parameter(f"{n}.weight").detach().clone() for n in quantizer.scales}
        cases[name] = (source, output, quantize_model(source, output, settings, WINDOWS, quiet=True), memory)
        torch.save(WINDOWS.tokens, output / "windows.pt")
    outputs = [str(output) for _, output, *_ in cases.values()]
    subprocess.run([sys.executable, "-c", RELOAD, *outputs], check=True, capture_output=True)
    return cases


@pytest.mark.parametrize("name", CASES)
def test_a_process_without_this_package_loads_what_was_measured(written, name):
    _, output, figures, memory = written[name]
    reloaded = torch.load(output / "reloaded.pt")
    assert len(memory) == figures["modules"] + 1
    for key, expected in memory.items():
        assert torch.equal(reloaded[key], expected), key


@pytest.mark.parametrize("name", CASES)
def test_our_own_reading_gives_the_same(written, name):
    _, output, _, memory = written[name]
    weights = SafetensorsWeights.open(output)
    for key in memory.keys() - {"logits"}:
        assert torch.equal(weights.linear(key.removesuffix(".weight")), memory[key])
    model = load_model(resolve_model(str(output)), quantized=True)
    with torch.no_grad():
        assert torch.equal(model(WINDOWS.tokens).logits, memory["logits"])


@pytest.mark.parametrize("name", [case for case in CASES if case != "dense"])
def test_masks_and_zeros_are_carried_on(written, name):
    source, output, *_ = written[name]
    outcome = verify_checkpoint(output)
    assert outcome.faults == [] and outcome.zeros == outcome.pruned > 0
    masks = "sparsity_masks.safetensors"
    assert (source / masks).read_bytes() == (output / masks).read_bytes()
    steps = json.loads((output / "sparsity_config.json").read_text())["steps"]
    assert [step["name"] for step in steps] == ["quantize"]
    assert steps[0]["calibration"]["fingerprint"] == WINDOWS.fingerprint


def test_a_dense_model_has_no_masks_to_carry(written):
    assert not list(written["dense"][1].glob("sparsity_*"))


@pytest.mark.parametrize("name", ["llama-4", "llama-8"])
def test_verify_finds_a_lost_zero(written, name, tmp_path):
    _, output, *_ = written[name]
    bits, module = CASES[name][3]["bits"], "model.layers.1.mlp.up_proj"
    mask = PrunedModel.load(written[name][0]).keep(module)
    row, column = (~mask).nonzero()[0].tolist()
    tensors = load_file(output / "model.safetensors")
    per_word = 32 // bits
    tensors[f"{module}.weight_packed"][row, column // per_word] ^= 1 << (column % per_word * bits)
    for path in output.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert verify_checkpoint(tmp_path).faults == [f"{module}: 1 of {int((~mask).sum())} zeros are lost"]


def test_the_configuration_is_what_vllm_reads(written):
    config = json.loads((written["llama-4"][1] / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors", "pack-quantized", ["lm_head"],
    )  # fmt: skip
    assert not config["sparsity_config"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 16)
    assert group["weights"]["symmetric"] and group["weights"]["strategy"] == "group"
    tensors = load_file(written["llama-4"][1] / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    shapes = {key: tuple(tensors[f"{name}_{key}"].shape) for key in ("packed", "scale", "shape")}
    assert shapes == {"packed": (32, 6), "scale": (32, 3), "shape": (2,)}
    assert tensors[f"{name}_shape"].tolist() == [32, 48]
    assert f"{name}_zero_point" not in tensors and name not in tensors


def test_figures_and_gptq_beats_rounding(pruned, tmp_path):
    errors = {}
    for method in ("gptq", "round-to-nearest"):
        settings = QuantizeSettings(method=method, bits=4, group_size=16)
        figures = quantize_model(pruned, tmp_path / method, settings, WINDOWS, quiet=True)
        errors[method] = figures["error"]
        assert figures["bytes_after"] < figures["bytes_before"]
        assert [block["block"] for block in figures["blocks"]][:2] == ["model.layers.0.attention", "model.layers.0.mlp"]
        assert figures["error"] == sum(block["error"] for block in figures["blocks"]) > 0
    assert errors["gptq"] < errors["round-to-nearest"]


def test_the_same_settings_give_the_same_bytes(pruned, tmp_path):
    settings = QuantizeSettings(group_size=16)
    for name in "ab":
        quantize_model(pruned, tmp_path / name, settings, WINDOWS, quiet=True)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_what_is_ignored_stays(pruned, tmp_path):
    settings = QuantizeSettings(group_size=16, ignore=["*.down_proj"])
    quantize_model(pruned, tmp_path / "out", settings, WINDOWS, quiet=True)
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignored) == {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))}
    before, after = load_file(pruned / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(before[key], after[key])
    assert verify_checkpoint(tmp_path / "out").faults == []


def test_inputs_that_were_never_seen_leave_rounding(pruned):
    name, opened = "model.layers.0.mlp.up_proj", PrunedModel.load(pruned)
    weight = opened.model.get_parameter(f"{name}.weight").detach()
    linear = LinearInput(name, weight, ANY_PATTERN, InputStatistics(gram=torch.zeros(32, 32)))
    made = MaskedQuantizer(opened, QuantizeSettings(group_size=16), {linear.name: 4})(linear)
    form = IntegerFormat(4, 16, torch.float32)
    assert torch.equal(made.keep, opened.keep(name))
    assert torch.equal(made.weight, round_to_nearest(weight, made.keep, form).dequantize())


def test_inputs_that_were_never_seen_do_not_drown_small_ones_in_damping():
    small = 1e-3 * torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    gram = small.t() @ small
    gram[3] = gram[:, 3] = 0
    expected = gram.diagonal()[gram.diagonal() > 0].mean()
    fill_dead(gram)
    assert gram[3, 3] == expected and gram.diagonal().mean() == pytest.approx(float(expected), rel=1e-5)
    none = torch.zeros(4, 4)
    fill_dead(none)
    assert torch.equal(none, torch.eye(4))


def test_another_tools_zeros_stay_without_a_record(tmp_path, tokenizer):
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[::2, ::3] = 0
    model.save_pretrained(tmp_path / "zeros")
    tokenizer.save_pretrained(tmp_path / "zeros")
    quantize_model(tmp_path / "zeros", tmp_path / "out", QuantizeSettings(group_size=16), WINDOWS, quiet=True)
    made = SafetensorsWeights.open(tmp_path / "out").linear("model.layers.0.mlp.up_proj")
    assert not made[::2, ::3].any() and made.count_nonzero() > 0.3 * made.numel()


def test_an_output_is_neither_the_input_nor_replaced_unasked(pruned, tmp_path):
    settings = QuantizeSettings(group_size=16)
    before = {path.name: path.read_bytes() for path in pruned.iterdir()}
    with pytest.raises(BarberError, match="is the input"):
        quantize_model(pruned, pruned, settings, WINDOWS, quiet=True, overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").touch()
    with pytest.raises(BarberError, match="is not empty"):
        quantize_model(pruned, tmp_path / "out", settings, WINDOWS, quiet=True)
    quantize_model(pruned, tmp_path / "out", settings, WINDOWS, quiet=True, overwrite=True, dtype="bfloat16")
    assert not (tmp_path / "out" / "note.txt").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {path.name: path.read_bytes() for path in pruned.iterdir()} == before


def test_a_failure_while_it_writes_leaves_nothing(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_barber.integrations.quantization.quantize.carry_masks", None)
    with pytest.raises(TypeError):
        quantize_model(pruned, tmp_path / "out", QuantizeSettings(group_size=16), WINDOWS, quiet=True)
    assert not list(tmp_path.iterdir())


def test_shards_are_the_originals(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", QuantizeSettings(group_size=16), WINDOWS, quiet=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    weights = SafetensorsWeights.open(str(tmp_path / "out"))
    assert weights.linear("model.layers.1.mlp.up_proj").shape == (48, 32)


def test_a_group_that_does_not_divide_every_width_is_refused(pruned, tmp_path):
    message = r"group size 32 does not divide the width 48 of model.layers.0.mlp.down_proj: .* 1, 2, 4, 8, 16$"
    with pytest.raises(BarberError, match=message):
        quantize_model(pruned, tmp_path / "out", QuantizeSettings(group_size=32), WINDOWS, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_read_but_not_pruned_or_quantized_again(written):
    reference = resolve_model(str(written["llama-4"][1]))
    with pytest.raises(BarberError, match="is quantized and cannot be pruned"):
        load_model(reference)
    with pytest.raises(BarberError, match="is quantized and cannot be pruned"):
        PrunedModel.load(reference.directory)
    assert load_model(reference, "float32", quantized=True).dtype == torch.float32


def test_without_the_library_the_extra_is_named(pruned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(MissingExtraError, match=r"optimum-barber\[quantize\]"):
        quantize_model(pruned, tmp_path / "out", QuantizeSettings(), WINDOWS, quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptqq"}, "unknown method 'gptqq': did you mean 'gptq'"),
        ({"bits": 3}, "bits"),
        ({"group_size": 0}, "group size 0 is not legal"),
        ({"damping": 0}, "damping"),
        ({"block_size": 0}, "block_size"),
        ({"sweeps": -1}, "sweeps"),
        ({"groups": 8}, "groups"),
    ],
)
def test_settings_that_are_not_legal_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizeSettings(**options)
