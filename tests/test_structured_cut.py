"""The cut: the masked big model equals the small one, and what a configuration cannot say is refused."""

import pytest
import torch
import transformers

from optimum_barber import BarberShrinker, ShrinkConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.models.measure import cache_argument
from optimum_barber.models.source import ModelSource
from optimum_barber.shrink.cut import cut_model, smaller_config
from optimum_barber.shrink.units import CHANNELS, HEADS, structure_of, units_of

from .conftest import FAMILIES, tiny_model, tiny_windows

EIGHT = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8}


def chosen(units, seed):
    """Units of the middle and the ends, another choice in every layer."""
    generator = torch.Generator().manual_seed(seed)
    each = units.count // units.groups
    keep = max(each // 2, 1)
    return sorted(
        start + int(unit)
        for start in range(0, units.count, each)
        for unit in torch.randperm(each, generator=generator)[:keep]
    )


def cut(model, unit="group", kinds=(HEADS, CHANNELS)):
    """The small model, and what stayed."""
    source = ModelSource(model)
    units, structure = units_of(source, unit), structure_of(source)
    kept = {
        f"{source.path}.{i}": {
            kind: chosen(units[kind], i) if kind in kinds else list(range(units[kind].count)) for kind in units
        }
        for i in range(len(source))
    }
    counts = {kind: len(kept[f"{source.path}.0"][kind]) for kind in units}
    config = smaller_config(model.config, structure, units, counts)
    return cut_model(model, config, kept, units), kept, units


@torch.no_grad()
def mask(model, kept, units):
    """Zero the columns that read the units that go, in place: their outputs no longer count."""
    for layer, stays in kept.items():
        for kind, unit in units.items():
            reader = model.get_submodule(f"{layer}.{unit.reader}")
            gone = set(range(unit.count)) - set(stays[kind])
            for u in gone:
                part = unit.slices[-1]
                reader.weight[:, part.start + u * part.width : part.start + (u + 1) * part.width] = 0


CASES = [
    *[(family, unit, {}) for family in FAMILIES if "opt" not in family for unit in ("group", "query")],
    ("llama", "group", EIGHT),
    ("mistral", "group", {**EIGHT, "num_key_value_heads": 4}),
    ("qwen3", "query", {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2}),
    ("gemma", "query", {"num_key_value_heads": 1}),
    ("gemma", "group", {"num_attention_heads": 6, "num_key_value_heads": 3}),
]


@pytest.mark.parametrize(("family", "unit", "changes"), CASES)
@torch.no_grad()
def test_the_masked_big_model_is_the_small_one(family, unit, changes):
    model, windows = tiny_model(family, **changes), tiny_windows(2, 24)
    dense = model(windows).logits
    small, kept, units = cut(model, unit)
    mask(model, kept, units)
    masked = model(windows).logits
    assert (masked - dense).abs().max() > 0.1
    assert (small(windows).logits - masked).abs().max() < 1e-5 * masked.abs().max().clamp_min(1)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["opt", "opt-post-norm"])
@torch.no_grad()
def test_opt_loses_channels_with_their_biases(family):
    model, windows = tiny_model(family), tiny_windows(2, 24)
    for layer in model.model.decoder.layers:
        layer.fc1.bias.uniform_(-1, 1)
    small, kept, units = cut(model, kinds=(CHANNELS,))
    mask(model, kept, units)
    assert (small(windows).logits - model(windows).logits).abs().max() < 1e-5
    assert small.model.decoder.layers[0].fc1.bias.shape == (24,)


@torch.no_grad()
def test_a_small_model_decodes_with_its_cache():
    model, windows = tiny_model("llama", **EIGHT), tiny_windows(1, 20)
    small, *_ = cut(model)
    whole = small(windows).logits[0, -1]
    cache = small(windows[:, :-1], use_cache=True).past_key_values
    assert torch.allclose(small(windows[:, -1:], **{cache_argument(small): cache}).logits[0, -1], whole, atol=1e-5)


def test_a_llama_that_its_config_refuses_becomes_the_same_mistral():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=8, rope_theta=5e5)
    source = ModelSource(model)
    units, structure = units_of(source), structure_of(source)
    config = smaller_config(model.config, structure, units, {HEADS: 5, CHANNELS: 48})
    assert type(config) is transformers.MistralConfig
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (5, 5, 4)
    assert config.sliding_window is None
    assert config.rope_parameters == model.config.rope_parameters
    assert type(smaller_config(model.config, structure, units, {HEADS: 4, CHANNELS: 9})) is transformers.LlamaConfig
    kept = {f"model.layers.{i}": {HEADS: [0, 2, 3, 6, 7], CHANNELS: list(range(48))} for i in range(2)}
    small, windows = cut_model(model, config, kept, units), tiny_windows(2, 24)
    mask(model, kept, units)
    with torch.no_grad():
        assert (small(windows).logits - model(windows).logits).abs().max() < 1e-5


def test_ties_dtype_and_generation_settings_are_kept():
    model = tiny_model(tie_word_embeddings=True).to(torch.bfloat16)
    model.generation_config.temperature = 0.3
    small, *_ = cut(model)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.generation_config.temperature == 0.3
    untied, *_ = cut(tiny_model("llama-bias-untied"))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def shrink(model, **settings):
    return BarberShrinker(model).shrink(ShrinkConfig(**settings), tiny_windows(), latency=False, quiet=True)


REFUSED = [
    (lambda: tiny_model("opt"), {"remove": 0.3}, "'opt' cannot lose heads: its configuration has no head_dim"),
    (
        lambda: tiny_model("gemma2", num_attention_heads=8, num_key_value_heads=8),
        {"remove_heads": 0.375},
        r"Gemma2Config cannot say .*num_attention_heads 5.*of 8 heads these can stay: 1, 2, 4",
    ),
    (
        lambda: tiny_model("llama-bias-untied", num_attention_heads=8, num_key_value_heads=8),
        {"remove_heads": 0.375},
        r"LlamaConfig refuses 5 heads .* lose its biases \(attention_bias, mlp_bias\); of 8 heads",
    ),
    (tiny_model, {"remove": 0.9}, "would take all 2 key-value groups of a layer: at most 1 can go"),
    (tiny_model, {"remove": 0.9, "head_unit": "query"}, "would take all 2 query heads of every group"),
    (tiny_model, {"remove": 0.9, "remove_heads": 0}, "would take all 48 FFN channels"),
    (tiny_model, {"remove_channels": 0.999}, "would take all 48 FFN channels"),
    (tiny_model, {"remove": 0.001}, "removes nothing"),
    (tiny_model, {"remove": 0.3, "round_to": 64}, "round-to 64 is larger than the layer: it has 48 FFN channels"),
    (tiny_model, {"remove": 0.3, "scorer": "bipp"}, "unknown scorer 'bipp': did you mean 'bip'"),
    (tiny_model, {"remove": 0.3, "scorer_args": {"gain": 1}}, "scorer 'bip' takes no argument 'gain': .*norm_gain"),
]


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED)
def test_what_cannot_be_cut_is_refused(make, settings, message):
    with pytest.raises(BarberError, match=message):
        shrink(make(), **settings)


def test_other_families_are_refused_by_name():
    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    with pytest.raises(BarberError, match="'gpt_neox' are not known: known are gemma, gemma2, llama"):
        shrink(transformers.GPTNeoXForCausalLM(config), remove=0.3)


def test_a_model_that_is_cut_unevenly_is_refused():
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        torch.nn.Linear(32, 40), torch.nn.Linear(32, 40), torch.nn.Linear(40, 32)
    )  # fmt: skip
    with pytest.raises(BarberError, match=r"unevenly already: model.layers.1.mlp.gate_proj is 40x32.* layer 0 48x32"):
        shrink(model, remove=0.3)


def test_heads_that_do_not_divide_are_refused():
    model = tiny_model()
    model.config.num_attention_heads = 5
    with pytest.raises(BarberError, match="5 query heads, .*32 rows.*16 rows.*no whole number"):
        shrink(model, remove=0.3)


def test_a_gradient_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr("optimum_barber.shrink.scorers.taylor.free_memory", lambda _: 1000)
    with pytest.raises(BarberError, match=r"'taylor' needs 5\.72e-05 GiB beside the model .* 9\.31e-07 GiB are free"):
        shrink(tiny_model(), remove=0.3, scorer="taylor")


def test_sick_weights_are_refused():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BarberError, match="NaN or Inf in model.layers.0.mlp.up_proj.weight"):
        shrink(model, remove=0.3)
