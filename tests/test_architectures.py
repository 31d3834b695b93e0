"""Every family: found, taken apart exactly, pruned; what cannot be pruned is refused by name."""

import pytest
import torch
import transformers

from optimum_barber.base.errors import BarberError
from optimum_barber.models.architectures import ARCHITECTURES, Architecture, architecture_of
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.pipeline import Plan, prune
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import FAMILIES, SIZES, tiny_model, tiny_windows


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_put_together_are_the_model(family):
    model, windows = tiny_model(family), tiny_windows()
    source = ModelSource(model)
    hidden = source.begin(windows)
    for layer in source.layers():
        for index, state in enumerate(hidden):
            outputs = []
            for block in layer.blocks:
                outputs.append(block(layer.input_of(block, state, outputs)))
            hidden[index] = layer.output(state, outputs)
    for index, state in enumerate(hidden):
        seen = []
        handle = source.stack[-1].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        model(windows[index : index + 1], use_cache=False)
        handle.remove()
        assert torch.equal(state, seen[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_whole(family):
    model = tiny_model(family)
    plan = Plan(PRODUCERS["wanda"], SparsityPattern(0.5, 2, 4))
    masks = prune(ModelSource(model), tiny_windows(), plan)
    expected = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    assert set(masks) == expected
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight == 0, ~mask.unpack())
        assert (mask.unpack().reshape(-1, 4).sum(1) == 2).all()


def test_the_table_names_the_blocks():
    assert ARCHITECTURES["opt"].mlp == ("fc1", "activation_fn", "fc2")
    with pytest.raises(BarberError, match=r"unknown architecture 'lama': did you mean 'llama'.* known are .*opt"):
        ARCHITECTURES["lama"]


def test_an_unknown_family_is_found_by_the_fallback(caplog):
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads",)}
    model = transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes, num_key_value_heads=4)).eval()
    assert architecture_of(model) == Architecture(attention=("self_attn",), mlp=("mlp",))
    assert "stablelm is not in the table of architectures; found attention = self_attn, mlp = mlp" in caplog.text
    assert len(prune(ModelSource(model), tiny_windows(), Plan(PRODUCERS["magnitude"], SparsityPattern(0.5)))) == 14


def test_a_family_with_parallel_blocks_works():
    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    assert len(prune(ModelSource(model), tiny_windows(), Plan(PRODUCERS["wanda"], SparsityPattern(0.5)))) == 8


def test_mixtures_of_experts_are_refused_by_name():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2)
    with pytest.raises(BarberError, match=r"no Linears and cannot be pruned: .*layers\.0\.mlp\.experts\.gate_up_proj"):
        ModelSource(transformers.MixtralForCausalLM(config))


def test_models_without_linears_are_refused():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, n_positions=64)
    with pytest.raises(BarberError, match=r"no Linears and cannot be pruned: .*c_attn\.weight"):
        ModelSource(transformers.GPT2LMHeadModel(config))


def test_a_second_stream_into_a_block_is_refused():
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=300)
    source = ModelSource(transformers.BloomForCausalLM(config).eval())
    with pytest.raises(BarberError, match="second stream"):
        prune(source, tiny_windows(), Plan(PRODUCERS["wanda"], SparsityPattern(0.5)))


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(BarberError, match="no list of decoder layers"):
        ModelSource(torch.nn.Sequential(torch.nn.Linear(2, 2)))
