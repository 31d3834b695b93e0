"""What follows pruning, for experts, transposed matrices and hybrids: it works, or is refused in one line."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.record import MaskFile, read_record
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.cli.main import main
from optimum_barber.models.activations import Activations
from optimum_barber.models.linears import Shapes, matrices_of_model
from optimum_barber.models.loading import empty_model
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.forecast import forward_flops
from optimum_barber.prune.cost.needs import needs_of
from optimum_barber.prune.pipeline import statistics_of_experts, watch
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.prune.refine.refiner import BarberRefiner, RefineConfig
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import SIZES, tiny_windows
from .test_experts import expert_states, gpt_oss, mixtral

HALF = SparsityPattern(0.5)


def gpt2(**sizes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{"vocab_size": 300, **sizes}, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def jamba(**sizes):
    torch.manual_seed(0)
    config = transformers.JambaConfig(
        **{**SIZES, **sizes}, num_experts=4, num_experts_per_tok=2, mamba_d_state=4, mamba_dt_rank=4,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
    )  # fmt: skip
    return transformers.JambaForCausalLM(config).eval()


FAMILIES = {"mixtral": mixtral, "gpt_oss": gpt_oss, "gpt2": gpt2, "jamba": jamba}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    """A dense and a pruned checkpoint of every family, by name."""
    folder = tmp_path_factory.mktemp("families")
    for name, build in FAMILIES.items():
        dense, sparse = folder / name / "dense", folder / name / "sparse"
        build(vocab_size=len(tokenizer)).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        config = BarberConfig(sparsity=0.5, rebuild="none")
        BarberSparsifier.from_pretrained(dense).sparsify(config, tiny_windows(), save_dir=sparse, quiet=True)
    return folder


@pytest.mark.parametrize(
    ("family", "lines"),
    [
        ("mixtral", ["block_sparse_moe.experts.{0..3}.w1 48x32", "dense         mlp.gate.weight 0."]),
        ("gpt_oss", ["mlp.experts.gate_up_proj.{0..3} 96x32", "mlp.experts.gate_up_proj_bias"]),
        ("gpt2", ["attention     attn.c_attn 96x32, attn.c_proj 32x32", "gpt2 (by a look at its layers)"]),
        ("jamba", ["of layers     0", "of layers     1", "feed_forward.experts.{0..3}.gate_proj 48x32"]),
    ],
)
def test_the_commands_know_every_family(checkpoints, text_file, capsys, family, lines):
    dense, sparse = str(checkpoints / family / "dense"), str(checkpoints / family / "sparse")
    assert main(["inspect", dense, "--samples", "2", "--sequence-length", "16"]) == 0
    page = capsys.readouterr().out
    assert all(line in page for line in lines) and "time          a few seconds" in page
    options = ["--sparsity", "0.5", "--calibration", str(text_file), "--samples", "2", "--sequence-length", "16"]
    assert main(["prune", dense, "-o", f"{sparse}-none", *options, "--dry-run"]) == 0
    evaluation = ["--perplexity", str(text_file), "--windows", "1", "--sequence-length", "16", "--quiet"]
    assert main(["eval", sparse, *evaluation]) == 0
    assert main(["verify", sparse]) == 0
    assert "all as recorded" in capsys.readouterr().out
    assert main(["shrink", dense, "-o", f"{sparse}-cut", "--remove", "0.3", *options[2:]]) == 2
    error = capsys.readouterr().err
    assert f"heads and channels of model type '{family}' are not known" in error and error.count("\n") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_counts_the_experts_of_each_token(family):
    model = FAMILIES[family]()
    source = ModelSource(empty_model(model.config))
    expected = 0
    for linear in matrices_of_model(source).values():
        share = 1 if getattr(linear, "expert", None) is None else 2 / 4
        expected += 2 * 16 * linear.weight.numel() * share
    assert expected < forward_flops(source, 16) < 1.6 * expected  # attention and routers come on top


def test_needs_count_the_gram_matrices_of_every_expert_and_the_outputs_of_those_of_a_token():
    needs = needs_of(ModelSource(mixtral()), 32, windows=4, length=16, checkpoint=0, grams=1)
    assert needs.gram == 4 * 4 * (32**2 + 48**2)
    assert needs.window_outputs == 4 * 16 * 2 * (48 + 48 + 32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["existing", "masks"])
def test_outside_masks_come_back_with_their_weights(checkpoints, family, kind):
    dense, sparse = checkpoints / family / "dense", checkpoints / family / "sparse"
    arguments = {"sparse_model": str(sparse), "keep_weights": True}
    if kind == "masks":
        arguments = {"masks": str(sparse / read_record(sparse).masks), "weights": str(sparse)}
    sparsifier = BarberSparsifier.from_pretrained(dense, stream="never")
    config = BarberConfig(producer=kind, producer_args=arguments, rebuild="none")
    result = sparsifier.sparsify(config, tiny_windows(), quiet=True)
    expected = MaskFile(sparse / read_record(sparse).masks)
    assert {name: mask.sha256 for name, mask in result.masks.items()} == {
        name: mask.sha256 for name, mask in expected.items()
    }


def test_a_square_transposed_matrix_is_read_as_the_files_hold_it(checkpoints, tmp_path):
    """Its shape does not tell: the mask of attn.c_proj, (32, 32), alone would pass either way."""
    sparse = checkpoints / "gpt2" / "sparse"
    config = BarberConfig(
        producer="existing", producer_args={"sparse_model": str(sparse)}, rebuild="none",
        ignore=["*c_attn", "*c_fc", "*mlp.c_proj"],
    )  # fmt: skip
    sparsifier = BarberSparsifier.from_pretrained(checkpoints / "gpt2" / "dense", stream="never")
    result = sparsifier.sparsify(config, tiny_windows(), quiet=True)
    stored = load_file(sparse / "model.safetensors")
    for name, mask in result.masks.items():
        assert torch.equal(mask.unpack(), stored[f"{name}.weight"].t() != 0)


def test_masks_in_another_layout_are_refused_by_their_shapes(checkpoints, tmp_path):
    sparse = checkpoints / "gpt2" / "sparse"
    weights = load_file(sparse / "model.safetensors")
    turned = {name: w.t().contiguous() if "c_fc.weight" in name else w for name, w in weights.items()}
    save_file(turned, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sparse / "config.json").read_bytes())
    shapes = Shapes(matrices_of_model(ModelSource(gpt2())))
    message = r"c_fc has shape \(128, 32\), the model's is \(32, 128\)"
    with pytest.raises(BarberError, match=message):
        PRODUCERS["existing"].brings_pattern(shapes, sparse_model=str(tmp_path))


SETTINGS = [
    {"producer": "sparsegpt"},
    {"rebuild": "dsnot"},
    {"rebuild": "swaps+gauss-newton"},
    {"rebuild": "barber", "reconstruct": "least-squares"},
    {"reconstruct": {"method": "gradient", "passes": 1}},
    {"allocation": "owl"},
    {"effort": "best"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "jamba"])
def test_every_method_prunes_experts_exactly_and_no_block_gets_worse(family, settings):
    config = BarberConfig(**{"sparsity": 0.5, "rebuild": "none", **settings})
    if "effort" in settings:
        config = BarberConfig(sparsity=0.5, **settings)
    result = BarberSparsifier(FAMILIES[family]()).sparsify(config, tiny_windows(samples=2), quiet=True)
    total = sum(mask.weights for mask in result.masks.values())
    assert sum(mask.pruned for mask in result.masks.values()) == total // 2
    if settings != {"rebuild": "dsnot"}:  # DSnoT has no measure of its own
        assert all(report.error_after <= report.error_before for report in result.reports)


@pytest.mark.parametrize("producer", ["wanda", "sparsegpt"])
def test_groups_hold_in_experts_that_few_tokens_reach(producer):
    model = mixtral(experts=16)
    result = BarberSparsifier(model).sparsify(
        BarberConfig(producer=producer, pattern="2:4"), tiny_windows(samples=1, length=8), quiet=True
    )
    for mask in result.masks.values():
        assert (mask.unpack().reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_refine_lowers_the_divergence_of_the_whole_model(checkpoints, tmp_path, family):
    sparse, output = checkpoints / family / "sparse", tmp_path / "refined"
    refiner = BarberRefiner.for_checkpoint(sparse)
    dense = {name: weight.clone() for name, weight in refiner.model.state_dict().items()}
    windows = tiny_windows(samples=32)
    result = refiner.refine(sparse, RefineConfig(steps=12), windows, output, quiet=True)
    report = result.as_report()
    assert report["divergence_after"] < report["divergence_before"] and result.swaps > 0
    assert not verify_checkpoint(output).faults
    before, after = read_record(sparse), read_record(output)
    assert {name: module.transposed for name, module in after.modules.items()} == {
        name: module.transposed for name, module in before.modules.items()
    }
    measuring = windows[::8]
    with torch.no_grad():
        pruned = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
        refiner.model.load_state_dict(dense)
        one, other = (model.eval()(measuring).logits.log_softmax(-1) for model in (pruned, refiner.model))
        divergence = (other.exp() * (other - one)).sum(-1).mean()
    assert float(divergence) == pytest.approx(report["divergence_after"], rel=1e-3)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
def test_more_than_two_experts_a_token_are_added_up_in_one_order_whatever_the_kernel(kernel):
    model = mixtral(experts=8, num_experts_per_tok=4)
    model.config._experts_implementation = kernel
    result = BarberSparsifier(model).sparsify(BarberConfig(sparsity=0.5, rebuild="none"), tiny_windows(), quiet=True)
    assert len(result.masks) == 2 * (4 + 8 * 3) and model.config._experts_implementation == kernel


def test_statistics_of_all_tokens_by_loops():
    source, windows = ModelSource(mixtral()), tiny_windows()
    hidden = Activations(source.begin(windows))
    needs = frozenset(["input_norm", "gram"])
    with torch.no_grad(), source.layer(0) as layer:
        attention, mlp = layer.blocks
        first = watch(layer, attention, hidden, [], attention.linears, frozenset(), HALF)
        trial = watch(layer, mlp, hidden, [first.targets], mlp.linears, needs, HALF)
        error = trial.error({name: torch.ones_like(linear.weight).bool() for name, linear in trial.linears.items()})
        assert error == 0  # the routed outputs are the targets
        statistics = statistics_of_experts(layer, trial, needs)
        assert statistics.keys() == trial.linears.keys()
        tokens = torch.cat([x.reshape(-1, 32) for x in trial.inputs]).double()
        for expert in range(4):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}"
            w1, w3 = (trial.weight(f"{name}.{part}").double() for part in ("w1", "w3"))
            rows = {"w1": list(tokens), "w3": list(tokens), "w2": [expert_states(w1, w3, token) for token in tokens]}
            for part, inputs in rows.items():
                actual = statistics[f"{name}.{part}"]
                assert actual.tokens == len(inputs) == 64
                gram = sum(torch.outer(row, row) for row in inputs)
                assert torch.allclose(actual.gram.double(), gram, rtol=1e-4, atol=1e-5)


def test_all_experts_calibrated_changes_masks_of_experts_alone():
    masks = {}
    for every in (False, True):
        config = BarberConfig(sparsity=0.5, rebuild="none", calibrate_all_experts=every)
        masks[every] = BarberSparsifier(mixtral()).sparsify(config, tiny_windows(samples=1), quiet=True).masks
    first = [name for name in masks[True] if ".layers.0." in name]
    changed = {name for name in first if masks[True][name].sha256 != masks[False][name].sha256}
    assert changed and all(".experts." in name for name in changed)


def test_all_experts_needs_a_router():
    config = BarberConfig(sparsity=0.5, calibrate_all_experts=True)
    with pytest.raises(BarberError, match="needs tokens that are routed to experts: gpt2 has none"):
        BarberSparsifier(gpt2()).sparsify(config, tiny_windows(), quiet=True)


def test_lora_keeps_the_zeros_of_transposed_linears_and_refuses_experts(checkpoints, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    from optimum_barber.checkpoints.pruned import PrunedModel
    from optimum_barber.integrations.lora.masked_lora import check_zeros, masked_lora

    opened = PrunedModel.load(checkpoints / "gpt2" / "sparse")
    tokens = tiny_windows(samples=1)
    adapter = masked_lora(opened.model, opened.masks, LoraConfig(r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        before = adapter(tokens, use_cache=False).logits
        merged = adapter.merge_and_unload(safe_merge=True)
        after = merged(tokens, use_cache=False).logits
    check_zeros(merged, opened.masks)
    assert torch.allclose(before, after, atol=1e-5)
    opened = PrunedModel.load(checkpoints / "mixtral" / "sparse")
    message = (
        r"LoRA cannot hold \S+experts\.0\.w1, an expert in a tensor of all: give Linears as targets, such as \S+q_proj"
    )
    with pytest.raises(BarberError, match=message):
        masked_lora(opened.model, opened.masks, LoraConfig(r=2))
    adapter = masked_lora(
        opened.model, opened.masks, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    check_zeros(adapter.merge_and_unload(), opened.masks)
