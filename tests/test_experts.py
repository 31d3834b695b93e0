"""Mixtures of experts: statistics, gradients and masks of an expert from its routed tokens; files as they came."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.models.activations import Activations
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.pipeline import Plan, prune, watch
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.prune.rebuilders import chain_of
from optimum_barber.prune.settings import BarberConfig as Settings
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import SIZES, tiny_model, tiny_windows

HALF = SparsityPattern(0.5)


def mixtral(experts=4, **sizes):
    torch.manual_seed(0)
    settings = {**SIZES, "num_experts_per_tok": 2, **sizes}
    config = transformers.MixtralConfig(**settings, num_local_experts=experts)
    return transformers.MixtralForCausalLM(config).eval()


def gpt_oss(**sizes):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **{**SIZES, **sizes}, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config).eval()


def llama4(**sizes):
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **{**SIZES, **sizes}, intermediate_size_mlp=48, num_local_experts=4, head_dim=8, moe_layers=[1]
    )
    return transformers.Llama4ForCausalLM(config).eval()


MIXTURES = {"mixtral": mixtral, "gpt_oss": gpt_oss, "llama4": llama4}


def expert_trial(model, needs=("input_norm", "gram")):
    """The sparse MLP of the first layer on trial, on the dense stream."""
    source, windows = ModelSource(model), tiny_windows()
    hidden = Activations(source.begin(windows))
    with source.layer(0) as layer:
        attention, mlp = layer.blocks
        first = watch(layer, attention, hidden, [], attention.linears, frozenset(), HALF)
        yield layer, watch(layer, mlp, hidden, [first.targets], mlp.linears, frozenset(needs), HALF)


def routing(layer, x):
    """The experts of each token, by the router's own code, and the weights of their outputs, in float64."""
    logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), layer.module.mlp.gate.weight).double()
    chosen = logits.topk(2).indices
    return chosen.tolist(), logits.softmax(-1)


def expert_states(w1, w3, token):
    """The input of an expert's second projection."""
    return torch.nn.functional.silu(w1 @ token) * (w3 @ token)


@torch.no_grad()
def test_statistics_of_an_expert_are_those_of_its_tokens():
    for layer, trial in expert_trial(mixtral()):
        for expert in range(4):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}"
            w1, w3 = (trial.weight(f"{name}.{part}").double() for part in ("w1", "w3"))
            rows = {"w1": [], "w2": []}
            for x in trial.inputs:
                experts, _ = routing(layer, x)
                for token, chosen in zip(x[0].double(), experts, strict=True):
                    if expert in chosen:
                        rows["w1"].append(token)
                        rows["w2"].append(expert_states(w1, w3, token))
            for part, inputs in rows.items():
                statistics = trial.statistics[f"{name}.{part}"]
                assert statistics.tokens == len(inputs) > 0
                gram = sum(torch.outer(row, row) for row in inputs)
                assert torch.allclose(statistics.gram.double(), gram, rtol=1e-4, atol=1e-4)
                norm = sum(row.square() for row in inputs).sqrt()
                assert torch.allclose(statistics.input_norm.double(), norm, rtol=1e-4)


def error_by_loops(layer, trial, weights):
    """E of the sparse MLP under these weights, token by token and expert by expert, in float64."""
    errors = []
    for x, target in zip(trial.inputs, trial.targets, strict=True):
        experts, probabilities = routing(layer, x)
        for index, (token, chosen) in enumerate(zip(x[0].double(), experts, strict=True)):
            total = probabilities[index, chosen].sum()
            output = torch.zeros(32, dtype=torch.float64)
            for expert in chosen:
                w1, w2, w3 = weights[expert]
                output += probabilities[index, expert] / total * (w2 @ expert_states(w1, w3, token))
            errors.append((output - target[0, index]).square().mean())
    return float(sum(errors) / len(errors))


@torch.no_grad()
def test_errors_and_gradients_of_experts_come_through_the_router():
    for layer, trial in expert_trial(mixtral()):
        torch.manual_seed(1)
        masks = {name: torch.rand(linear.weight.shape) > 0.5 for name, linear in trial.linears.items()}
        weights = []
        for expert in range(4):
            names = [f"model.layers.0.block_sparse_moe.experts.{expert}.{part}" for part in ("w1", "w2", "w3")]
            weights.append([trial.weight(name, masks[name]).double() for name in names])
        assert trial.error(masks) == pytest.approx(error_by_loops(layer, trial, weights), rel=1e-4)
        gradients = trial.gradients(masks, reduction="mean")
        for expert, part in ((1, 0), (2, 1), (3, 2)):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{('w1', 'w2', 'w3')[part]}"
            entry, step, errors = weights[expert][part][3:4, 5:6], 1e-5, []
            for change in (step, -2 * step):
                entry += change
                errors.append(error_by_loops(layer, trial, weights))
            entry += step
            slope = abs(errors[0] - errors[1]) / (2 * step)
            assert float(gradients[name][3, 5]) == pytest.approx(slope, rel=1e-3, abs=1e-9)


def send_every_token_to_the_first(model):
    def chosen(gate, _, answer):
        tokens = len(answer[0])
        return (answer[0], torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.long))

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(chosen)
    return model


def test_one_expert_that_gets_every_token_has_the_masks_of_a_dense_mlp():
    mixture = send_every_token_to_the_first(mixtral(experts=2))
    dense = tiny_model("mistral", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    state = dense.state_dict()
    for name, parameter in mixture.named_parameters():
        if name in state:
            parameter.data.copy_(state[name])
    for small, layer in zip(dense.model.layers, mixture.model.layers, strict=True):
        gate_up = torch.cat([small.mlp.gate_proj.weight, small.mlp.up_proj.weight])
        layer.mlp.experts.gate_up_proj.data[0].copy_(gate_up)
        layer.mlp.experts.down_proj.data[0].copy_(small.mlp.down_proj.weight)
    masks = {}
    for kind, model in (("mixture", mixture), ("dense", dense)):
        plan = Plan(PRODUCERS["wanda"], HALF)
        masks[kind] = prune(ModelSource(model), tiny_windows(), plan)
    for part, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        for index in range(2):
            expert = masks["mixture"][f"model.layers.{index}.block_sparse_moe.experts.0.{part}"]
            assert expert.sha256 == masks["dense"][f"model.layers.{index}.mlp.{name}"].sha256


def test_an_expert_without_tokens_is_pruned_by_magnitude(caplog):
    model = send_every_token_to_the_first(mixtral())
    weight = model.model.layers[0].mlp.experts.down_proj[3].detach().clone()
    masks = prune(ModelSource(model), tiny_windows(), Plan(PRODUCERS["wanda"], HALF))
    keep = masks["model.layers.0.block_sparse_moe.experts.3.w2"].unpack()
    for values, row in zip(weight, keep, strict=True):
        assert values[row].abs().min() >= values[~row].abs().max()
    assert "no token reaches 9 of 12 Linears of a block" in caplog.text


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("pattern", [HALF, SparsityPattern(0.5, 2, 4)], ids=str)
def test_no_block_gets_worse_and_counts_are_exact(family, pattern):
    reports = []
    model = MIXTURES[family]()
    chain = chain_of(Settings(sparsity=0.5).rebuild)
    masks = prune(
        ModelSource(model), tiny_windows(), Plan(PRODUCERS["wanda"], pattern, rebuilders=chain), reports.append
    )
    assert all(report.error_after <= report.error_before for report in reports)
    assert sum(report.swaps for report in reports) > 0
    assert sum(2 * mask.pruned - mask.weights for mask in masks.values()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MIXTURES)
def test_replays_give_the_bits_of_the_model(family, dtype):
    ModelSource(MIXTURES[family](), dtype=dtype).begin(tiny_windows())


@pytest.mark.parametrize("family", MIXTURES)
def test_from_disk_and_from_memory_the_same_files(family, tmp_path, tokenizer):
    model = MIXTURES[family](vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    results = {}
    for stream in ("always", "never"):
        sparsifier = BarberSparsifier.from_pretrained(tmp_path / "dense", stream=stream)
        results[stream] = sparsifier.sparsify(
            BarberConfig(sparsity=0.5), tiny_windows(), save_dir=tmp_path / stream, quiet=True
        )
        assert not verify_checkpoint(tmp_path / stream).faults
    one, other = (load_file(tmp_path / stream / "model.safetensors") for stream in results)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert one.keys() == other.keys() == dense.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
        assert tensor.shape == dense[name].shape
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "always").eval()
    tokens = tiny_windows()[:1]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, sparsifier.model.eval()(tokens).logits)


def test_parts_that_cannot_be_pruned_are_named_with_their_share():
    torch.manual_seed(0)
    config = transformers.JetMoeConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=300,
    )  # fmt: skip
    sparsifier = BarberSparsifier(transformers.JetMoeForCausalLM(config).eval())
    message = r"model has \S+ % of its layers' weights in parts that cannot be pruned \(mlp\.input_linear\.weight \S+%"
    with pytest.raises(BarberError, match=message.replace(" %", "%")):
        sparsifier.sparsify(BarberConfig(sparsity=0.5), tiny_windows())
    result = sparsifier.sparsify(BarberConfig(sparsity=0.5, allow_dense_rest=True), tiny_windows())
    assert result.masks
