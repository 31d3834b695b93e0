"""Quantized experts, hybrids and models of images and text: transformers loads what was measured, or a refusal."""

import re

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import tiny_config, tiny_model
from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.integrations.quantization.quantize import quantize_blocks, quantize_model
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.loading import auto_class, load_model, resolve_model
from optimum_barber.text.windows import TokenWindows

from .conftest import tiny_windows

pytest.importorskip("compressed_tensors")
WINDOWS = TokenWindows(tiny_windows(samples=2), "tokens", "calibration", 2)
CASES = {  # group size, what is ignored, and how many matrices are packed
    "mixtral": (16, [], 44),
    "qwen3_moe": (-1, [], 44),
    "deepseek_v3": (16, [], 34),
    "qwen3_next": (8, [], 49),
    "gpt_oss": (16, ["*experts*"], 8),
    "lfm2": (16, [], 14),
    "falcon_h1": (16, [], 18),
    "gemma3": (16, [], 14),
}


def dense_checkpoint(directory, tokenizer, kind, dtype=torch.float32):
    tiny_model(tiny_config(kind)).to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def pruned(folder, tokenizer, kind, dtype=torch.float32):
    dense_checkpoint(folder / "dense", tokenizer, kind, dtype)
    config = BarberConfig(sparsity=0.5, rebuild="none")
    BarberSparsifier.from_pretrained(folder / "dense").sparsify(config, WINDOWS, folder / "sparse", quiet=True)
    return folder / "sparse"


def check_loaded(sparse, output, settings):
    """Plain transformers and this package load the logits that quantizing in memory gives, and every zero."""
    opened = PrunedModel.load(sparse)
    quantize_blocks(opened, settings, WINDOWS, quiet=True)
    for model in (
        auto_class(opened.model.config).from_pretrained(output).eval(),
        load_model(resolve_model(str(output)), quantized=True),
    ):
        with torch.no_grad():
            assert torch.equal(model(WINDOWS.tokens).logits, opened.model(WINDOWS.tokens).logits)
    outcome = verify_checkpoint(output)
    assert not outcome.faults and outcome.zeros == outcome.pruned > 0


@pytest.mark.parametrize("kind", CASES)
def test_transformers_loads_the_logits_that_were_measured_and_every_zero(tmp_path, tokenizer, kind):
    size, ignore, count = CASES[kind]
    dtype = torch.bfloat16 if kind in ("qwen3_moe", "lfm2") else torch.float32
    sparse, output = pruned(tmp_path, tokenizer, kind, dtype), tmp_path / "out"
    settings = QuantizeSettings(group_size=size, ignore=ignore)
    figures = quantize_model(sparse, output, settings, WINDOWS, quiet=True)
    assert figures["modules"] == count and figures["bytes_after"] < figures["bytes_before"]
    check_loaded(sparse, output, settings)


MIXED = {
    "experts of more bits": ("qwen3_moe", {"*experts*": 8}),
    "experts of fewer bits, all projections": ("mixtral", {"*self_attn*": 8, "*": 2}),
    "attention of fewer bits": ("mixtral", {"*.v_proj": 2}),
    "shared experts of their own bits": ("deepseek_v3", {"*.shared_experts.*": 8, "*.experts.*": 2}),
}


@pytest.mark.parametrize("case", MIXED)
def test_transformers_loads_what_was_measured_where_bits_differ(tmp_path, tokenizer, case):
    kind, bits_of = MIXED[case]
    sparse, output = pruned(tmp_path, tokenizer, kind), tmp_path / "out"
    settings = QuantizeSettings(group_size=16, bits_of=bits_of)
    quantize_model(sparse, output, settings, WINDOWS, quiet=True)
    check_loaded(sparse, output, settings)


@pytest.mark.parametrize("bits_of", [{"*.w2": 8}, {"*.experts.0.*": 8}])
def test_experts_of_different_bits_are_refused(tmp_path, tokenizer, bits_of):
    dense = dense_checkpoint(tmp_path / "dense", tokenizer, "mixtral")
    settings = QuantizeSettings(group_size=16, bits_of=bits_of)
    with pytest.raises(
        BarberError, match=r"bits of experts are 4 of model\..* and 8 of model\..*: transformers decodes"
    ):
        quantize_model(dense, tmp_path / "out", settings, WINDOWS, quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_expert_is_quantized_by_the_tokens_that_its_router_sends(tmp_path, tokenizer):
    """Rounding loses more on these tokens, and in all."""
    dense = dense_checkpoint(tmp_path / "dense", tokenizer, "mixtral")
    windows = TokenWindows(tiny_windows(samples=8, length=32), "tokens", "calibration", 8)
    errors = {}
    for method in ("gptq", "round-to-nearest"):
        settings = QuantizeSettings(method=method, group_size=-1, ignore=["*self_attn*"])
        figures = quantize_model(dense, tmp_path / method, settings, windows, quiet=True)
        errors[method] = figures["error"]
    assert errors["gptq"] < 0.9 * errors["round-to-nearest"]
    source = load_model(resolve_model(str(dense)))
    seen = _tokens_of_expert(source, windows.tokens, expert=1)
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    weight = SafetensorsWeights.open(dense).linear(name).double()
    losses = []
    for method in errors:
        change = SafetensorsWeights.open(tmp_path / method).linear(name).double() - weight
        losses.append(sum(float((change @ token).square().sum()) for token in seen))
    assert losses[0] < losses[1]


def _tokens_of_expert(model, windows, expert):
    """The inputs of the first sparse MLP that its router sends to an expert, in float64."""
    inputs = []
    layer = model.model.layers[0]
    hook = layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    hook.remove()
    tokens = []
    for token in torch.cat(inputs):
        if expert in (layer.mlp.gate.weight @ token).topk(4).indices.tolist():
            tokens.append(token.double())
    return tokens


def test_a_lost_zero_of_an_expert_is_found(tmp_path, tokenizer):
    sparse, output = pruned(tmp_path, tokenizer, "mixtral"), tmp_path / "out"
    quantize_model(sparse, output, QuantizeSettings(group_size=16), WINDOWS, quiet=True)
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    mask = PrunedModel.load(sparse).keep(name)
    row, column = (~mask).nonzero()[0].tolist()
    tensors = load_file(output / "model.safetensors")
    tensors[f"{name}.weight_packed"][row, column // 8] ^= 1 << (column % 8 * 4)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    assert verify_checkpoint(output).faults == [f"{name}: 1 of {int((~mask).sum())} zeros are lost"]


REFUSED = {
    "experts that stay dense": (
        "mixtral", ["*experts*"],
        "not supported for mixtral: transformers puts model.layers.0.mlp.experts.gate_up_proj together from packed "
        "weights alone, and model.layers.0.block_sparse_moe.experts.0.w1.weight stays dense",
    ),
    "one expert that stays dense": ("mixtral", ["*experts.3.w2"], "experts.3.w2.weight stays dense"),
    "experts in a tensor of all": (
        "gpt_oss", [], "cannot pack model.layers.0.mlp.experts.gate_up_proj.0, an expert in a tensor of all",
    ),
    "transposed": ("gpt2", [], "cannot pack transformer.h.0.attn.c_attn, a transposed Linear"),
    "a kernel out of parts": (
        "kimi_linear", [], "conv1d.weight together from packed weights alone, and model.layers.0.self_attn.q_conv1d",
    ),
    "experts that the quantized model has elsewhere": (
        "llama4_text", ["*experts*"], "not supported for llama4_text: transformers has other names",
    ),
    "a class that looks at weights while it loads": (
        "falcon", [], "not supported for falcon: transformers does not read its packed weights back (AttributeError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_could_not_read_back_is_refused_before_any_work(
    tmp_path, tokenizer, capfd, monkeypatch, case
):
    if case == "a kernel out of parts" and Version(transformers.__version__) < Version("5.22"):
        pytest.skip(f"transformers {transformers.__version__} keeps that kernel whole")
    kind, ignore, message = REFUSED[case]
    dense = dense_checkpoint(tmp_path / "dense", tokenizer, kind)
    capfd.readouterr()
    monkeypatch.setattr("optimum_barber.integrations.quantization.quantize.prune", None)
    with pytest.raises(BarberError, match=re.escape(message)) as error:
        settings = QuantizeSettings(group_size=8, ignore=ignore)
        quantize_model(dense, tmp_path / "out", settings, WINDOWS, quiet=True)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert not [line for line in capfd.readouterr().err.splitlines() if "Loading weights" not in line]
