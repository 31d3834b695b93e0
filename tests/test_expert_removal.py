"""Removal of experts: scores by loops, the smaller model's function, its files and their check."""

import json

import pytest
import torch
import transformers

from optimum_barber.base.errors import BarberError
from optimum_barber.cli.main import main
from optimum_barber.runs.verify import verify_product
from optimum_barber.shrink.experts import plan_removal, remove_experts
from optimum_barber.shrink.settings import ShrinkConfig
from optimum_barber.shrink.shrinker import BarberShrinker

from .conftest import SIZES, tiny_windows
from .test_experts import expert_states, expert_trial, gpt_oss, mixtral, routing

CPU = torch.device("cpu")


@torch.no_grad()
def test_scores_are_those_of_a_loop_over_tokens():
    windows, name = tiny_windows(), "model.layers.0.mlp.experts"
    scores = {}
    for scorer in ("reap", "bip", "magnitude"):
        _, _, scores[scorer] = remove_experts(plan_removal(mixtral(), 0.25, scorer, CPU), windows)
    for layer, trial in expert_trial(mixtral(), ()):
        prefix = "model.layers.0.block_sparse_moe.experts"
        for expert in range(4):
            w1, w2, w3 = (trial.weight(f"{prefix}.{expert}.{part}").double() for part in ("w1", "w2", "w3"))
            norms, bound = [], 0.0
            for x in trial.inputs:
                experts, probabilities = routing(layer, x)
                for index, chosen in enumerate(experts):
                    if expert in chosen:
                        gate = probabilities[index, expert] / probabilities[index, chosen].sum()
                        states = expert_states(w1, w3, x[0, index].double())
                        norms.append(float(gate * (w2 @ states).norm()))
                        bound += float(gate * (states.abs() @ w2.abs().sum(0)))
            assert scores["reap"][name][expert] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
            assert scores["bip"][name][expert] == pytest.approx(bound, rel=1e-4)
            total = sum(float(weight.abs().sum()) for weight in (w1, w2, w3))
            assert scores["magnitude"][name][expert] == pytest.approx(total, rel=1e-6)


@torch.no_grad()
def test_the_smaller_model_is_the_large_one_whose_router_picks_fewer_experts():
    model, tokens = gpt_oss(), tiny_windows()[:1]
    small, kept, _ = remove_experts(plan_removal(model, 0.25, "reap", CPU), tiny_windows())
    for layer, experts in zip(model.model.layers, kept.values(), strict=True):
        assert len(experts) == 3
        [gone] = set(range(4)) - set(experts)
        layer.mlp.router.bias[gone] = -1e9
    assert torch.allclose(small(tokens).logits, model(tokens).logits, atol=1e-5)


@torch.no_grad()
def test_an_expert_that_no_token_needs_goes_without_a_trace():
    model, tokens = mixtral(), tiny_windows()
    for layer in model.model.layers:
        layer.mlp.experts.down_proj[2] = 0  # it adds nothing, so that its score is 0
    small, kept, _ = remove_experts(plan_removal(model, 0.25, "reap", CPU), tokens)
    assert set(map(tuple, kept.values())) == {(0, 1, 3)}
    for name in ("gate_up_proj", "down_proj"):
        before = getattr(model.model.layers[0].mlp.experts, name)
        assert torch.equal(getattr(small.model.layers[0].mlp.experts, name), before[[0, 1, 3]])
    assert torch.equal(small.model.layers[1].mlp.gate.weight, model.model.layers[1].mlp.gate.weight[[0, 1, 3]])
    assert small.config.num_local_experts == 3


@pytest.mark.parametrize("scorer", ["reap", "bip", "magnitude", "random"])
def test_every_scorer_leaves_a_checkpoint_that_loads_and_verifies(scorer, tmp_path, tokenizer, text_file, capsys):
    mixtral(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    command = ["shrink", str(tmp_path / "dense"), "--scorer", scorer, "--remove-experts", "0.25", "--samples", "2"]
    command += ["--sequence-length", "16", "--calibration", str(text_file), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert "4 -> 3 (0.750)" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_local_experts == 3
    assert not verify_product(tmp_path / "out").faults
    record = json.loads((tmp_path / "out" / "pruned_experts.json").read_text(encoding="utf-8"))
    assert record["scorer"] == scorer and len(record["layers"]) == 2
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "out" / "model.safetensors")
    state["model.layers.1.block_sparse_moe.experts.0.w2.weight"][0, 0] += 1
    save_file(state, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    [fault] = verify_product(tmp_path / "out").faults
    assert "model.layers.1.block_sparse_moe.experts.0.w2.weight" in fault


@pytest.mark.parametrize(
    ("share", "scorer", "message"),
    [
        (0.75, "reap", r"remove experts 0\.75 leaves 1 of 4, and the router picks 2: at most 0\.5"),
        (0.01, "reap", r"remove experts 0\.01 removes none of 4: one is 0\.25 of them"),
        (0.25, "rep", r"unknown expert scorer 'rep': did you mean 'reap'"),
    ],
)
def test_what_cannot_go_is_refused_before_any_work(share, scorer, message):
    with pytest.raises(BarberError, match=message):
        plan_removal(mixtral(), share, scorer, CPU)


def test_a_dense_model_and_other_shares_are_refused():
    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(BarberError, match="needs a mixture of experts: llama has none"):
        BarberShrinker(transformers.LlamaForCausalLM(config)).shrink(ShrinkConfig(remove_experts=0.25), tiny_windows())
    with pytest.raises(ValueError, match="remove experts stands alone"):
        ShrinkConfig(remove_experts=0.25, remove=0.2)
