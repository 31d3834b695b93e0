"""LoRA under masks: gradients by an oracle, and zeros that stay through training, merging and unmerging."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PlainLora
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.record import ModuleSparsity, SparsityConfig
from optimum_barber.integrations.lora.checkpoint import load_adapter, merge_lora, verify_adapter
from optimum_barber.integrations.lora.layer import MaskedLinear, masked_delta
from optimum_barber.integrations.lora.masked_lora import mask_fingerprint, masked_lora
from optimum_barber.models.loading import load_model, resolve_model
from optimum_barber.tensors.masks import PackedMask

from .conftest import tiny_model, tiny_windows

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
FAMILIES = ["llama", "llama-bias-untied", "opt", "phi3"]


def prune_in_place(model, seed=1):
    """Random masks on the Linears of all decoder layers."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            keep = torch.rand(module.weight.shape, generator=generator) > 0.5
            module.weight.data *= keep
            masks[name] = PackedMask.pack(keep)
    return masks


def one_linear(out, width, keep, dtype=torch.float32, seed=0):
    """A model of one pruned Linear, called "0", and its masks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, out, bias=False, dtype=dtype))
    model[0].weight.data *= keep
    return model, {"0": PackedMask.pack(keep)}


def config(**changes):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "init_lora_weights": False, **changes})


def oracle(x, weight, lower, upper, scale, keep, gradient):
    """Output, and the gradients of sum(output * gradient) for A, B and x, in loops from W + s (B A) ⊙ M."""
    (rows, width), out, rank = x.shape, len(weight), len(lower)
    output, d_lower = torch.zeros(rows, out).double(), torch.zeros(rank, width).double()
    d_upper, d_x = torch.zeros(out, rank).double(), torch.zeros(rows, width).double()
    for o in range(out):
        for i in range(width):
            change = scale * sum(upper[o, r] * lower[r, i] for r in range(rank)) if keep[o, i] else 0.0
            for n in range(rows):
                output[n, o] += x[n, i] * (weight[o, i] + change)
                d_x[n, i] += gradient[n, o] * (weight[o, i] + change)
                for r in range(rank):
                    if keep[o, i]:
                        d_lower[r, i] += gradient[n, o] * x[n, i] * scale * upper[o, r]
                        d_upper[o, r] += gradient[n, o] * x[n, i] * scale * lower[r, i]
    return output, d_lower, d_upper, d_x


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # drops nothing, but goes peft's way
def test_output_and_gradients_equal_the_oracle(rslora, dropout):
    keep = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) > 0.5
    model, masks = one_linear(4, 5, keep)
    adapter = masked_lora(model, masks, config(task_type=None, use_rslora=rslora, lora_dropout=dropout))
    layer = adapter.base_model.model[0]
    lower, upper = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, gradient = torch.randn(6, 5, requires_grad=True), torch.randn(6, 4)
    output = adapter(x)
    (output * gradient).sum().backward()
    numbers = [t.detach().double() for t in (x, layer.base_layer.weight, lower, upper)]
    expected = oracle(*numbers, 5 / 3**0.5 if rslora else 5 / 3, keep, gradient.double())
    for result, wanted in zip((output, lower.grad, upper.grad, x.grad), expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


@given(
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    rank=st.integers(1, 4),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
    safe=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_zero_is_ever_lost_and_no_kept_weight_left_behind(out, width, rank, density, seed, safe, dtype):
    keep = torch.rand(out, width, generator=torch.Generator().manual_seed(seed)) < density
    model, masks = one_linear(out, width, keep, dtype, seed)
    adapter = masked_lora(model, masks, config(task_type=None, r=rank))
    layer = adapter.base_model.model[0]
    weight, before = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapter(torch.randn(3, width, dtype=dtype)).sum().backward()
        optimizer.step()
    delta = layer.get_delta_weight("default")
    adapter.merge_adapter(safe_merge=safe)
    assert not weight[~keep].any()
    assert torch.equal(weight, (before + delta).to(dtype))
    adapter.unmerge_adapter()
    assert not weight[~keep].any()
    torch.testing.assert_close(weight.float(), before.float(), rtol=2e-2, atol=2e-2 * (1 + delta.abs().max().item()))


def test_zeros_stay_even_where_the_adapter_is_not_finite():
    keep = torch.tensor([[True, False], [False, True]])
    delta = masked_delta(torch.full((1, 2), torch.inf), torch.zeros(2, 1), 1.0, PackedMask.pack(keep))
    assert torch.equal(delta[~keep], torch.zeros(2)) and delta[keep].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged_models_compute_the_same(family):
    model, windows = tiny_model(family), tiny_windows()
    masks = prune_in_place(model)
    before = model(windows).logits
    adapter = masked_lora(model, masks, config())
    unmerged = adapter(windows).logits
    assert sum(isinstance(module, MaskedLinear) for module in adapter.modules()) == len(masks)
    assert (unmerged - before).abs().max() > 0.1
    with adapter.disable_adapter():
        assert torch.equal(adapter(windows).logits, before)
    merged = adapter.merge_and_unload(safe_merge=True)
    assert torch.equal(merged(windows).logits, unmerged)
    for name, mask in masks.items():
        assert not merged.get_parameter(f"{name}.weight")[~mask.unpack()].any()


def test_a_bfloat16_model_takes_float32_adapters_and_merges_with_one_rounding():
    model, windows = tiny_model().bfloat16(), tiny_windows()
    adapter = masked_lora(model, prune_in_place(model), config(lora_dropout=0.1))
    assert {p.dtype for p in adapter.parameters() if p.requires_grad} == {torch.float32}
    adapter.train()(windows, labels=windows).loss.backward()
    unmerged = adapter.eval()(windows).logits
    assert unmerged.dtype == torch.bfloat16
    adapter.merge_adapter()
    assert torch.equal(adapter(windows).logits, unmerged)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_delta_is_kept_for_the_backward_pass(dropout):
    keep = torch.rand(40, 50) > 0.5
    model, masks = one_linear(40, 50, keep)
    adapter, saved = masked_lora(model, masks, config(task_type=None, lora_dropout=dropout)).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(torch.randn(2, 50))
    base = adapter.base_model.model[0].base_layer.weight
    assert len(saved) > 2 and all(t.numel() < keep.numel() for t in saved if t.data_ptr() != base.data_ptr())


def test_targets_without_a_mask_get_plain_lora():
    model = tiny_model(tie_word_embeddings=False)
    masks = prune_in_place(model)
    dense = "model.layers.0.mlp.up_proj"
    del masks[dense]
    adapter = masked_lora(model, masks, config(target_modules=["q_proj", "up_proj"]))
    kinds = {name: type(m) for name, m in adapter.base_model.model.named_modules() if isinstance(m, PlainLora)}
    assert kinds[dense] is PlainLora
    assert kinds["model.layers.1.mlp.up_proj"] is kinds["model.layers.0.self_attn.q_proj"] is MaskedLinear
    assert len(kinds) == 4
    assert type(masked_lora(tiny_model(), {}, config(target_modules=["q_proj"])).peft_config["default"]) is LoraConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"target_parameters": ["weight"]},
        {"modules_to_save": ["up_proj"]},
        {"modules_to_save": ["mlp"]},
    ],
)
def test_settings_that_break_masks_are_refused_by_name(changes):
    model = tiny_model()
    with pytest.raises(BarberError, match=f"LoRA setting {next(iter(changes))}=.*"):
        masked_lora(model, prune_in_place(model), config(target_modules=["q_proj"], **changes))


def test_models_that_do_not_hold_their_masks_are_refused():
    model = tiny_model()
    masks = prune_in_place(model)
    name = next(iter(masks))
    with pytest.raises(BarberError, match=f"zeros of {name} are filled"):
        masked_lora(tiny_model(), masks, config())
    with pytest.raises(BarberError, match="model has no Linear lost"):
        masked_lora(model, {"lost": masks[name]}, config())
    with pytest.raises(BarberError, match=r"has shape \(32, 32\), its mask \(2, 2\)"):
        masked_lora(model, {name: PackedMask.pack(torch.ones(2, 2).bool())}, config())


def test_no_way_around_the_masks_is_open_in_peft():
    model = tiny_model()
    adapter = masked_lora(model, prune_in_place(model), config())
    bound = adapter.peft_config["default"]
    assert not adapter.supports_lora_conversion()
    with pytest.raises(BarberError, match="configuration has no mask"):
        adapter.add_adapter("plain", config(target_modules=["q_proj"]))
    with pytest.raises(BarberError, match="without its masks"):
        get_peft_model(tiny_model(), dataclasses.replace(bound))
    again = masked_lora(tiny_model(), {}, config(target_modules=["q_proj"]))
    assert again.supports_lora_conversion()


def test_a_second_adapter_of_the_same_configuration_is_masked_too():
    model = tiny_model()
    masks = prune_in_place(model)
    adapter = masked_lora(model, masks, config())
    adapter.add_adapter("second", dataclasses.replace(adapter.peft_config["default"], r=2))
    adapter.merge_adapter(adapter_names=["default", "second"])
    name, mask = next(iter(masks.items()))
    assert not adapter.get_base_model().get_submodule(name).base_layer.weight[~mask.unpack()].any()


def test_masks_are_no_part_of_a_state_dict_and_their_fingerprint_is_the_records():
    model = tiny_model()
    masks = prune_in_place(model)
    assert not any("keep" in key for key in masked_lora(model, masks, config()).state_dict())
    modules = {
        name: ModuleSparsity(shape=mask.shape, pruned=mask.pruned, sparsity=0.5, sha256=mask.sha256)
        for name, mask in reversed(masks.items())
    }
    assert mask_fingerprint(masks) == SparsityConfig.model_construct(modules=modules).fingerprint


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.filterwarnings("ignore")  # peft tells of the embeddings that it saves
def test_adapters_of_embeddings_are_opened_and_merged(tmp_path, tokenizer, target, pruned):
    model, windows = tiny_model(tie_word_embeddings=False), tiny_windows()
    if pruned:
        settings = BarberConfig(sparsity=0.5, rebuild="none")
        BarberSparsifier(model, tokenizer).sparsify(settings, windows, tmp_path / "model", quiet=True)
    else:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    opened = PrunedModel.load(tmp_path / "model")
    adapted = masked_lora(opened.model, opened.masks, config(target_modules=["q_proj", target])).eval()
    with torch.no_grad():
        expected = adapted(windows).logits
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        assert torch.equal(load_adapter(tmp_path / "adapter")(windows).logits, expected)
        merge_lora(tmp_path / "adapter", tmp_path / "merged")
        merged = load_model(resolve_model(str(tmp_path / "merged")))(windows).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)
    assert verify_adapter(tmp_path / "adapter").faults == []
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "base_layer" in key)
    save_file({**tensors, key: tensors[key] + 1}, path, {"format": "pt"})
    with pytest.raises(BarberError, match=f"brings {key} .*, which is not the model's: it was trained on resized"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_would_change_a_tied_weight_is_refused(tmp_path, tokenizer, target):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    opened = PrunedModel.load(tmp_path / "model")
    masked_lora(opened.model, {}, config(target_modules=["q_proj", target])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BarberError, match=r"cannot be merged: .*embed_tokens.* and lm_head.* are one weight"):
        merge_lora(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_other_adapters_are_refused_in_one_line():
    model = tiny_model()
    masks = prune_in_place(model)
    with pytest.raises(BarberError, match="settings IA3Config are not supported: legal is peft's LoraConfig"):
        masked_lora(model, masks, IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(BarberError, match="unmerged adapter"):
        masked_lora(masked_lora(model, masks, config()), masks, config())
