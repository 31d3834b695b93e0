"""The pass over a model: same seed, same masks; counts exact; errors measured, never rising."""

import pytest
import torch
import transformers

from optimum_barber.base.errors import BarberError
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.pipeline import Plan, prune
from optimum_barber.prune.producers import PRODUCERS, Producer
from optimum_barber.prune.rebuilders import Outcome, chain_of
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import SIZES, tiny_model, tiny_windows


def run(model, windows=None, producer="wanda", pattern=None, batch_size=None, **rebuild):
    """Masks and block reports of one run."""
    config = BarberConfig(
        producer=producer, sparsity=None if pattern else 0.5, pattern=pattern, rebuild={"method": "barber", **rebuild}
    )
    plan = Plan(
        PRODUCERS[producer], config.sparsity_pattern(), rebuilders=chain_of(config.rebuild), batch_size=batch_size
    )
    reports = []
    masks = prune(ModelSource(model), tiny_windows(8) if windows is None else windows, plan, reports.append)
    return {name: mask.sha256 for name, mask in masks.items()}, reports, masks


SETTINGS = [
    {},
    {"rebuild_ratio": 0.6, "granularity": "output"},
    {"rebuild_ratio": 0.1, "granularity": "layer", "reduction": "mean"},
    {"rebuild_ratio": 0.8, "granularity": "input", "metric": "gradient"},
    {"rebuild_ratio": 1.0, "rounds": 2, "metric": "weight"},
    {"pattern": "2:4"},
    {"pattern": "1:4", "granularity": "layer", "rebuild_ratio": 0.5},
    {"pattern": "4:8", "pairing": "row", "granularity": "output", "rebuild_ratio": 0.6},
    {"producer": "magnitude", "expansion": "dense"},
    {"producer": "sparsegpt"},
    {"method": "barber+barber", "rounds": 1},
    {"method": "gauss-newton", "error": "absolute"},
    {"method": "swaps+gauss-newton", "newton_rounds": 1, "pattern": "2:4"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"method": "swaps+gauss-newton", "pattern": "2:4"}], ids=str)
def test_gradients_that_a_model_holds_have_no_say_and_stay(settings, dtype):
    windows, (clean, used) = tiny_windows(4), (tiny_model().to(dtype) for _ in range(2))
    used(input_ids=windows, labels=windows).loss.mul(1000).backward()
    held = {name: parameter.grad for name, parameter in used.named_parameters()}
    assert run(used, windows, **settings)[0] == run(clean, windows, **settings)[0]
    assert all(parameter.grad is held[name] for name, parameter in used.named_parameters())


@pytest.mark.parametrize("settings", [{}, {"method": "swaps+gauss-newton", "pattern": "2:4"}], ids=str)
def test_linears_may_share_a_weight(settings):
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
    _, reports, _ = run(model, **settings)
    assert all(report.error_after <= report.error_before for report in reports)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_error_rises_and_every_count_is_exact(family, settings):
    model = tiny_model(family)
    _, reports, masks = run(model, **settings)
    assert all(report.error_after <= report.error_before for report in reports)
    assert sum(record["swaps"] for report in reports for record in report.rounds) > 0
    pruned = sum(mask.pruned for mask in masks.values())
    reference = run(tiny_model(family), **{**settings, "method": "none"})[2]
    assert pruned == sum(mask.pruned for mask in reference.values())
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight == 0, ~mask.unpack())


def test_the_measured_error_is_the_models_own():
    """The last block's E, from the finished model: its MLP against the dense MLP on the same inputs."""
    model, dense, windows = tiny_model(), tiny_model(), tiny_windows(8)
    _, reports, _ = run(model, windows)
    errors, seen = [], []
    mlp = model.model.layers[-1].mlp
    handle = mlp.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for window in windows.split(1):
            model(window)
            x, output = seen.pop()
            errors.append(((output - dense.model.layers[-1].mlp(x)).double() ** 2).mean().item())
    handle.remove()
    assert reports[-1].error_after == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_two_runs_and_every_batch_size_give_the_same_bits():
    first, again, small = tiny_model(), tiny_model(), tiny_model()
    expected = run(first)[0]
    assert run(again)[0] == expected
    assert run(small, batch_size=3)[0] == expected
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_llama_and_mistral_give_the_same_masks():
    llama = tiny_model()
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=None)).eval()
    mistral.load_state_dict(llama.state_dict())
    assert run(llama)[0] == run(mistral)[0]


def test_another_thread_count_keeps_every_count():
    def counts():
        masks = run(tiny_model(), rebuild_ratio=0.6, granularity="output")[2]
        return {name: mask.pruned for name, mask in masks.items()}

    threads, expected = torch.get_num_threads(), counts()
    torch.set_num_threads(threads + 1)
    try:
        assert counts() == expected
    finally:
        torch.set_num_threads(threads)


def test_half_precision_weights_keep_their_values():
    model = tiny_model().to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _, reports, masks = run(model)
    assert all(report.error_after <= report.error_before for report in reports)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, torch.where(mask.unpack(), before[f"{name}.weight"], 0))


def test_ignored_linears_stay_dense_and_whole_blocks_may_be_ignored():
    model, before = tiny_model(), tiny_model()
    plan = Plan(PRODUCERS["wanda"], SparsityPattern(0.5), ignore=["*.k_proj", "model.layers.1.mlp.*"])
    masks = prune(ModelSource(model), tiny_windows(), plan)
    assert len(masks) == 14 - 2 - 3
    ignored = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(ignored), before.get_parameter(ignored))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda linear: linear.weight, r"is torch.float32 \(32, 32\), expected torch.bool \(32, 32\)"),
        (lambda linear: linear.weight[:1] > 0, r"is torch.bool \(1, 32\), expected torch.bool \(32, 32\)"),
        (lambda linear: None, "is NoneType, expected torch.bool"),
        (lambda linear: linear.weight < 99, "prunes 0 of 1024 weights, expected 512"),
    ],
)
def test_a_producers_bad_answer_is_named(function, message):
    plan = Plan(Producer(function), SparsityPattern(0.5))
    with pytest.raises(BarberError, match=f"mask for model.layers.0.self_attn.q_proj {message}"):
        prune(ModelSource(tiny_model()), tiny_windows(), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: {}, "are of \\[\\], expected"),
        (lambda masks: {n: k.float() for n, k in masks.items()}, "q_proj is torch.float32"),
        (
            lambda masks: {n: ~k if n.endswith("q_proj") else k for n, k in masks.items()},
            "does not hold the pattern 1:4",
        ),
        (lambda masks: {n: k.t() if n.endswith("k_proj") else k for n, k in masks.items()}, "k_proj is torch.bool"),
    ],
)
def test_a_rebuilders_bad_masks_are_named(change, message):
    plan = Plan(
        PRODUCERS["magnitude"], SparsityPattern.parse("1:4", None), rebuilders=[lambda t: Outcome(change(t.masks))]
    )
    with pytest.raises(BarberError, match=message):
        prune(ModelSource(tiny_model()), tiny_windows(), plan)


def test_a_rebuilder_may_move_weights_between_linears_but_not_win_any():
    def all_kept(trial):
        return Outcome({name: torch.ones_like(keep) for name, keep in trial.masks.items()})

    plan = Plan(PRODUCERS["magnitude"], SparsityPattern(0.5), rebuilders=[all_kept])
    with pytest.raises(BarberError, match="keep 3072 weights, expected 1536 as before"):
        prune(ModelSource(tiny_model()), tiny_windows(), plan)


def test_published_code_accepts_whatever_comes():
    _, reports, _ = run(tiny_model(), preset="published-code", rebuild_ratio=1.0)
    assert all(report.rounds[0]["accepted"] for report in reports)
    assert all(report.rounds[0]["ratio"] == 1.0 for report in reports)


def test_only_one_layer_is_ever_in_the_working_dtype():
    model = tiny_model().half()
    source = ModelSource(model)
    source.begin(tiny_windows(1))
    for _ in source.layers():
        assert sum(next(layer.parameters()).dtype == torch.float32 for layer in source.stack) == 1
    assert all(p.dtype == torch.float16 for p in model.parameters())
