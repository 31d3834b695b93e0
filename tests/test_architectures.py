"""Every family: found, taken apart exactly, pruned; what cannot be pruned is refused by name."""

from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version

from benchmarks.architectures import check
from benchmarks.tiny_models import tiny_config
from benchmarks.tiny_models import tiny_model as tiny_class
from optimum_barber.base.errors import BarberError
from optimum_barber.models.architectures import ARCHITECTURES, Architecture, architecture_of
from optimum_barber.models.blocks import hidden_of
from optimum_barber.models.source import ModelSource, experts_one_by_one
from optimum_barber.prune.pipeline import Plan, prune
from optimum_barber.prune.producers import PRODUCERS, Producer
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
    assert architecture_of(model) == Architecture(generic=True)
    assert len(prune(ModelSource(model), tiny_windows(), Plan(PRODUCERS["magnitude"], SparsityPattern(0.5)))) == 14
    assert caplog.text.count("stablelm is not in the table of architectures; the blocks of its first layer are ") == 1
    assert "attention (self_attn), mlp (mlp)" in caplog.text


def test_a_family_with_parallel_blocks_works():
    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    assert len(prune(ModelSource(model), tiny_windows(), Plan(PRODUCERS["wanda"], SparsityPattern(0.5)))) == 8


def bloom():
    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=300)
    return transformers.BloomForCausalLM(config).eval()


def gemma_with_arguments_for_each_window(shared=0):
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=8, vocab_size=300, hidden_size_per_layer_input=8, vocab_size_per_layer_input=300,
        num_kv_shared_layers=shared, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return transformers.Gemma4ForCausalLM(config).eval()


def falcon():
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, ffn_hidden_size=64
    )
    return transformers.FalconForCausalLM(config).eval()


def gemma_with_several_streams(shared=0):
    torch.manual_seed(0)
    layers = 2 + shared
    config = transformers.Gemma3nTextConfig(
        hidden_size=32, intermediate_size=[48] * layers, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=300, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300, laurel_rank=4, num_kv_shared_layers=shared, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        activation_sparsity_pattern=[0.0] * layers, altup_num_inputs=2,
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(config).eval()


MEASURED_WITH = Version("5.23.0")  # the version of transformers of docs/architectures.md


def skip_before_measured(reason):
    if Version(transformers.__version__) < MEASURED_WITH:
        pytest.skip(f"transformers {transformers.__version__} cannot build it: {reason}")


def tiny_of(model_type):
    if model_type not in transformers.CONFIG_MAPPING:
        skip_before_measured(f"it has no {model_type}")
    return tiny_class(tiny_config(model_type))


UNUSUAL = {
    "two streams": bloom, "arguments by window": gemma_with_arguments_for_each_window, "in place": falcon,
    "several streams": gemma_with_several_streams,
    "shared keys and values": partial(gemma_with_arguments_for_each_window, shared=2),
    "shared, several streams": partial(gemma_with_several_streams, shared=2),
    "shared by returning indices": partial(tiny_of, "glm_moe_dsa"),
    "router states for the next layer": partial(tiny_of, "zaya"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
def test_masks_do_not_depend_on_the_order_of_the_windows(kind):
    windows, plan = tiny_windows(), Plan(PRODUCERS["wanda"], SparsityPattern(0.5))
    masks = prune(ModelSource(UNUSUAL[kind]()), windows, plan)
    turned = prune(ModelSource(UNUSUAL[kind]()), windows.flip(0), plan)
    differing = sum(int((mask.unpack() != turned[name].unpack()).sum()) for name, mask in masks.items())
    assert differing == 0


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_block_that_loses_nothing_has_no_error(kind):
    reports = []
    keep_all = Producer(lambda linear: torch.ones_like(linear.weight, dtype=torch.bool), frozenset())
    plan = Plan(keep_all, SparsityPattern(0.5), exact=False)
    prune(ModelSource(UNUSUAL[kind]()), tiny_windows(), plan, reports.append)
    assert [report.error_before for report in reports] == [0.0] * len(reports)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_replays_give_the_bits_of_the_model(family, dtype):
    build = UNUSUAL.get(family) or partial(tiny_model, family)
    ModelSource(build(), dtype=dtype).begin(tiny_windows())


@pytest.mark.parametrize("kind", [kind for kind in UNUSUAL if kind.startswith("shared")])
@torch.no_grad()
def test_what_layers_share_is_what_the_pruned_model_computes(kind, monkeypatch):
    model, windows, streams = UNUSUAL[kind](), tiny_windows(), []
    own = ModelSource.commit

    def commit(self, index, masks, hidden):
        streams.append([sample[0] if isinstance(sample, tuple) else sample for sample in hidden.held])
        return own(self, index, masks, hidden)

    monkeypatch.setattr(ModelSource, "commit", commit)
    prune(ModelSource(model), windows, Plan(PRODUCERS["wanda"], SparsityPattern(0.5)))
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    for index, window in enumerate(windows.split(1)):
        seen.clear()
        with experts_one_by_one(model):
            model(window, use_cache=False)
        assert len(seen) == len(streams) == len(model.model.layers)
        for stream, output in zip(streams, seen, strict=True):
            assert torch.equal(stream[index], hidden_of(output))


def test_a_layer_that_writes_into_a_tensor_of_others_is_refused_by_name():
    model = tiny_model()
    layer = model.model.layers[1]
    forward = layer.forward

    def writing(*args, position_embeddings, **kwargs):
        position_embeddings[0].add_(0)
        return forward(*args, position_embeddings=position_embeddings, **kwargs)

    layer.forward = writing
    with pytest.raises(BarberError, match=r"layers\.1 cannot be replayed: it writes to its argument position_embedd"):
        ModelSource(model).begin(tiny_windows())


CLASSES = {
    "a list of attentions": "longcat_flash", "a decoder that is a head": "modernbert-decoder",
    "hyper-connections": "qwen4_exp_text", "attention within a child": "dbrx",
}  # fmt: skip
WRAPPERS = {
    "of two Auto classes": "qwen3_5", "a device that is asked for": "idefics3", "a head by two names": "kosmos-2.5",
    "Linears in parts": "minimax_m3_vl", "a bias in another order": "kimi_k25",
}  # fmt: skip


@pytest.mark.parametrize("kind", [*CLASSES, *WRAPPERS])
def test_of_each_unusual_class_all_holds(tmp_path, kind):
    outcome = check((CLASSES | WRAPPERS)[kind], tmp_path, wrapper=kind in WRAPPERS)
    if outcome.verdict == "not built":
        skip_before_measured(outcome.notes)
    assert outcome.verdict == "ok", outcome


def test_routers_stay_dense():
    model = tiny_class(tiny_config("jetmoe"))
    masks = prune(ModelSource(model), tiny_windows(), Plan(PRODUCERS["magnitude"], SparsityPattern(0.5)))
    assert set(masks) == {f"model.layers.{index}.self_attention.kv_proj" for index in range(2)}


def test_a_layer_that_does_more_than_its_blocks_is_refused_by_name():
    model = tiny_model()
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) + torch.rand(())
    with pytest.raises(BarberError, match=r"model\.layers\.1 cannot be replayed by its blocks \(attention, mlp\)"):
        ModelSource(model).begin(tiny_windows())


def test_layers_that_are_not_called_in_turn_are_refused():
    model = tiny_model()
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(BarberError, match=r"model\.layers\.1 cannot be replayed: it calls \S+attention 0 times"):
        ModelSource(model).begin(tiny_windows())


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(BarberError, match="no list of decoder layers"):
        ModelSource(torch.nn.Sequential(torch.nn.Linear(2, 2)))
