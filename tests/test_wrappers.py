"""Models as callers hold them: served with the same masks, or refused in one line; left in the modes they came in."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from optimum_barber import (
    BarberConfig,
    BarberRefiner,
    BarberShrinker,
    BarberSparsifier,
    RefineConfig,
    ShrinkConfig,
    perplexity,
)
from optimum_barber.base.errors import BarberError
from optimum_barber.text.windows import TokenWindows

from .conftest import SIZES, tiny_model, tiny_windows

CONFIG = BarberConfig(sparsity=0.5, rebuild="barber+swaps")
TOKENS = tiny_windows(6)
WINDOWS = TokenWindows(tiny_windows(), "tokens", "evaluation", 4)


def masks(model, config=CONFIG):
    """Hashes of the masks of a model."""
    result = BarberSparsifier(model).sparsify(config, TOKENS, quiet=True)
    return {name: mask.sha256 for name, mask in result.masks.items()}


@pytest.fixture(scope="module")
def expected():
    return masks(tiny_model())


def compiled_layers(model):
    for layer in model.model.layers:
        layer.compile()
    return model


def compiled_in_place(model):
    model.compile()
    return model


def checkpointing(model):
    model.train().enable_input_require_grads()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    return model


def configured(**settings):
    def change(model):
        for name, value in settings.items():
            setattr(model.config, name, value)
        return model

    return change


def classifier(model):
    held = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=3))
    held.model = model.model
    return held


SERVED = {
    "torch.compile": torch.compile,
    "compiled in place": compiled_in_place,
    "layers compiled": compiled_layers,
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
    "training": lambda model: model.train(),
    "checkpointing": checkpointing,
    "frozen": lambda model: model.requires_grad_(False),
    "outputs": configured(output_hidden_states=True, return_dict=False, use_cache=True),
    "classifier": classifier,
}


@pytest.mark.parametrize("hold", SERVED.values(), ids=SERVED)
def test_the_same_masks_and_the_modes_stay(expected, hold):
    held = hold(tiny_model())
    modes = [module.training for module in held.modules()], [p.requires_grad for p in held.parameters()]
    config = copy.deepcopy(getattr(held, "config", None))
    assert masks(held) == expected
    assert ([module.training for module in held.modules()], [p.requires_grad for p in held.parameters()]) == modes
    assert str(getattr(held, "config", None)) == str(config)


def test_a_model_without_a_head_has_the_same_masks_under_its_own_names(expected):
    assert {f"model.{name}": sha for name, sha in masks(tiny_model().model).items()} == expected


@contextmanager
def default(setting, value, before):
    """A default of torch for the time of a test."""
    setting(value)
    try:
        yield
    finally:
        setting(before)


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: default(torch.set_default_device, "meta", None),
    "default dtype": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_the_callers_modes_do_not_matter(expected, context):
    model = tiny_model()
    with context():
        actual = masks(model)
        state = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        defaults = torch.get_default_dtype(), torch.get_default_device()
    assert actual == expected
    with context():
        assert state == (
            torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        )  # fmt: skip
        assert defaults == (torch.get_default_dtype(), torch.get_default_device())


def adapted(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def offloaded(model):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def compiled_within(model):
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def made_in_inference_mode(model):
    with torch.inference_mode():
        return tiny_model()


def shared(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def viewed(model):
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data
    return model


def one_layer_twice(model):
    model.model.layers[1] = model.model.layers[0]
    return model


def masked_by_torch(model):
    l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.1)
    return model


def packed(model):
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter((up.weight * 10).to(torch.uint8).reshape(-1, 1), requires_grad=False)
    return model


def empty(model):
    return model.to("meta")


HELD = {
    "adapter": (adapted, "unmerged adapter in base_model: merge it first"),
    "adapter within": (lambda m: adapted(m).get_base_model(), "unmerged adapter in .*q_proj: merge it first"),
    "offloaded": (offloaded, "holds no weights of model.embed_tokens.weight: it is offloaded or empty; load it whole"),
    "empty": (empty, "holds no weights of model.embed_tokens.weight"),
    "compiled within": (compiled_within, "a part that is compiled, model.layers.1: give the model as it was before"),
    "inference": (made_in_inference_mode, r"made inside torch.inference_mode\(\).*: load it outside"),
    "torch's prune": (masked_by_torch, "computes the weight of model.layers.0.mlp.up_proj on the way"),
    "state": (lambda m: m.state_dict(), "model is of class OrderedDict, which is no model: give what"),
    "name": (lambda m: "a/name", "model is of class str, which is no model: .* or a name to from_pretrained"),
}
CHECKED = {
    "shared": (shared, "one weight between model.layers.0.mlp.up_proj and model.layers.1.mlp.up_proj"),
    "viewed": (viewed, "one weight between model.layers.0.mlp.up_proj and model.layers.1.mlp.up_proj"),
    "one layer twice": (one_layer_twice, "one weight between model.layers.0.self_attn.q_proj and model.layers.1"),
    "packed": (packed, "quantized weights, which cannot be pruned: model.layers.0.mlp.up_proj.weight"),
}


@pytest.mark.parametrize(("hold", "message"), {**HELD, **CHECKED}.values(), ids={**HELD, **CHECKED})
def test_what_cannot_be_served_is_refused_in_one_line(hold, message):
    held = hold(tiny_model())
    with pytest.raises(BarberError, match=message) as refused:
        masks(held)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tool", [BarberShrinker, BarberRefiner])
@pytest.mark.parametrize(("hold", "message"), HELD.values(), ids=HELD)
def test_every_tool_refuses_the_same(tool, hold, message):
    with pytest.raises(BarberError, match=message):
        tool(hold(tiny_model()))


@pytest.mark.parametrize("context", [nullcontext, *CONTEXTS.values()], ids=["plain", *CONTEXTS])
def test_shrink_serves_the_same(context):
    config = ShrinkConfig(remove=0.25, compensate=True)
    actual = []
    for hold in (lambda model: model, lambda model: torch.compile(model.train())):
        model = hold(tiny_model())
        training, inside = model.training, context if actual else nullcontext
        with inside():
            result = BarberShrinker(model).shrink(config, TOKENS, latency=False, quiet=True)
        actual.append(result.model.state_dict())
        assert model.training == training
    assert all(torch.equal(actual[0][name], actual[1][name]) for name in actual[0])


def test_refine_serves_the_same_and_leaves_the_modes(tmp_path):
    BarberSparsifier(tiny_model()).sparsify(BarberConfig(sparsity=0.5, rebuild="none"), TOKENS, tmp_path / "s")
    actual = []
    for context, hold in ((nullcontext, lambda model: model), (torch.inference_mode, torch.compile)):
        model = hold(tiny_model().train())
        with context():
            result = BarberRefiner(model).refine(tmp_path / "s", RefineConfig(steps=1), TOKENS, quiet=True)
        actual.append({name: mask.sha256 for name, mask in result.masks.items()})
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert actual[0] == actual[1]


def test_perplexity_needs_logits_of_every_token_and_leaves_the_mode():
    model = tiny_model().train()
    assert perplexity(model, WINDOWS, quiet=True) == perplexity(model.eval(), WINDOWS, quiet=True)
    model.train()
    perplexity(model, WINDOWS, quiet=True)
    assert model.training
    for held in (model.model, classifier(model)):
        with pytest.raises(BarberError, match="without logits of every token: give a causal LM"):
            perplexity(held, WINDOWS, quiet=True)
