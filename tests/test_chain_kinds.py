"""A mixture of experts, GPT-OSS, a hybrid, GPT-2 and a model of images and text through the whole chain."""

import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import tiny_config, tiny_model
from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.cli.main import main
from optimum_barber.runs.recipe import run_recipe

from .conftest import tiny_windows

pytest.importorskip("compressed_tensors")
pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("no_charts")
KINDS = {  # what LoRA and the quantization are told; None: no quantization
    "mixtral": ("targets: ['*q_proj', '*o_proj']", ""),
    "gpt_oss": ("targets: ['*q_proj']", ", ignore: ['*experts*']"),
    "lfm2": ("", ""),
    "falcon_h1": ("targets: ['*q_proj']", ""),
    "gpt2": ("", None),
    "gemma3": ("", ""),
}
RECIPE = """\
name: kinds
model: {model}
calibration: {{texts: [{text}], samples: 2, sequence_length: 16}}
stages:
{stages}
output: {output}
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        tiny_model(tiny_config(kind)).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def recipe(tmp_path, dense, text_file):
    def write(kind, *stages):
        lines = "\n".join(f"  - {stage}" for stage in stages)
        text = RECIPE.format(model=dense / kind, text=text_file, stages=lines, output=tmp_path / "out")
        (tmp_path / "recipe.yaml").write_text(text.replace("TEXT", str(text_file)), encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_from_the_first_mask_to_the_report(recipe, kind):
    lora, quantize = KINDS[kind]
    stages = [
        "prune: {sparsity: 0.5, rebuild: {rounds: 1}}", "refine: {steps: 2}",
        f"lora: {{steps: 1, batch_size: 1, rank: 2{lora and ', ' + lora}}}", "merge",
    ]  # fmt: skip
    if quantize is not None:
        stages.append(f"quantize: {{group_size: 16{quantize}}}")
    stages += ["evaluate: {perplexity: [TEXT], windows: 1}", "report"]
    result = run_recipe(recipe(kind, *stages), quiet=True)
    zeros = [figures["zeros"] for figures in result.stages.values() if "zeros" in figures]
    assert len(zeros) == len(stages) - 2 and len(set(zeros)) == 1
    assert verify_checkpoint(result.model).faults == []
    measured = next(figures for name, figures in result.stages.items() if name.endswith("evaluate"))
    assert measured["model"]["perplexity"] and measured["dense"]["perplexity"]
    assert "perplexity" in (result.output / f"{len(stages):02d}-report" / "report.md").read_text()


REFUSED = {
    "experts under LoRA": ("mixtral", "lora: {steps: 1}", "LoRA cannot hold model.layers.0.block_sparse_moe.experts"),
    "a Linear that Mamba's kernels read": ("falcon_h1", "lora: {steps: 1}", "mamba.out_proj: peft refuses it"),
    "a target of another kind": (
        "gpt2",
        "lora: {steps: 1, targets: ['*q_proj']}",
        "target '*q_proj' matches no Linear",
    ),
    "transposed": (
        "gpt2",
        "quantize: {group_size: 16}",
        "cannot pack transformer.h.0.attn.c_attn, a transposed Linear",
    ),
    "a tensor of all experts": ("gpt_oss", "quantize: {group_size: 16}", "an expert in a tensor of all"),
    "experts left dense": ("mixtral", "quantize: {group_size: 16, ignore: ['*experts*']}", "stays dense"),
    "a group": ("lfm2", "quantize", "group size 128 does not divide the width 64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_later_stage_that_does_not_fit_the_model_is_refused_before_the_first(recipe, capsys, tmp_path, case):
    kind, stage, message = REFUSED[case]
    path = str(recipe(kind, "prune: {sparsity: 0.5}", stage))
    for arguments in (["run", path], ["run", path, "--dry-run"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("0*"))


def test_a_recipe_removes_experts_and_prunes_the_smaller_model(recipe):
    shrink = "shrink: {remove_experts: 0.3, scorer: reap}"
    result = run_recipe(recipe("mixtral", shrink, "prune: {sparsity: 0.5}", "report"), quiet=True)
    figures = result.stages["01-shrink"]
    assert figures["experts"] == 4 and figures["parameters_after"] < figures["parameters_before"]
    assert AutoModelForCausalLM.from_pretrained(result.model).config.num_local_experts == 4


def test_what_lost_experts_is_measured_beside_its_dense_model_and_reported(dense, tmp_path, text_file, capsys):
    output = str(tmp_path / "cut")
    calibration = ["--calibration", str(text_file), "--samples", "2", "--sequence-length", "16"]
    assert main(["shrink", str(dense / "mixtral"), "-o", output, "--remove-experts", "0.3", *calibration]) == 0
    evaluation = ["--perplexity", str(text_file), "--windows", "1", "--sequence-length", "16", "--quiet"]
    assert main(["eval", output, *evaluation]) == 0
    assert f"{dense / 'mixtral'} (dense)" in capsys.readouterr().out
    assert main(["report", output]) == 0
    assert "with 4 of 6 experts" in (tmp_path / "cut" / "report.html").read_text()


def test_arguments_of_a_scorer_of_heads_are_refused_for_experts(dense, tmp_path, capsys):
    output = tmp_path / "cut"
    arguments = ["--remove-experts", "0.25", "--scorer-arg", "norm_gain=true"]
    assert main(["shrink", str(dense / "mixtral"), "-o", str(output), *arguments]) == 2
    assert "scorer args" in capsys.readouterr().err and not output.exists()


@pytest.fixture(scope="module")
def others(tmp_path_factory, tokenizer):
    """Pruned checkpoints of models with fewer and with more experts, by kind and number."""
    folder = tmp_path_factory.mktemp("others")
    for kind in ("mixtral", "gpt_oss"):
        for count in (4, 8):
            config = tiny_config(kind)
            config.num_local_experts = count
            sparsifier = BarberSparsifier(AutoModelForCausalLM.from_config(config), tokenizer)
            settings = BarberConfig(sparsity=0.5, producer="magnitude", rebuild="none")
            sparsifier.sparsify(settings, tiny_windows(samples=1), folder / f"{kind}-{count}", quiet=True)
    return folder


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(("count", "message"), [(4, ".4"), (8, ".6")])
def test_masks_of_a_model_with_other_experts_are_refused(
    dense, others, recipe, text_file, tmp_path, monkeypatch, capsys, kind, count, message
):
    pytest.importorskip("lm_eval")
    from optimum_barber.integrations.lm_eval.checkpoint import checkpoint_for

    monkeypatch.setenv("OPTIMUM_BARBER_CACHE", str(tmp_path / "cache"))
    sparse, output = others / f"{kind}-{count}", tmp_path / "never"
    masks = sparse / "sparsity_masks.safetensors"
    run = ["prune", str(dense / kind), "-o", str(output), "--calibration", str(text_file), "--rebuild", "none"]
    commands = [
        [*run, "--producer", "masks", "--producer-arg", f"masks={masks}"],
        [*run, "--producer", "existing", "--producer-arg", f"sparse_model={sparse}"],
        ["run", str(recipe(kind, f"prune: {{producer: masks, producer_args: {{masks: '{masks}'}}}}"))],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("optimum-barber: ") and "experts" in error and message in error
    with pytest.raises(BarberError, match=re.escape(message)):
        checkpoint_for(str(dense / kind), {"masks": str(masks)}, "cpu", [])
    assert not output.exists()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_fewer_experts_than_the_router_picks_are_refused(dense, tmp_path, text_file, capsys, kind):
    few = tmp_path / "few"
    shutil.copytree(dense / kind, few)
    config = json.loads((few / "config.json").read_text())
    (few / "config.json").write_text(json.dumps({**config, "num_local_experts": 2, "num_experts_per_tok": 4}))
    text = ["--calibration", str(text_file)]
    for command in (
        ["prune", str(few), "-o", str(tmp_path / "out"), "--sparsity", "0.5", *text],
        ["shrink", str(few), "-o", str(tmp_path / "out"), "--remove-experts", "0.5", *text],
        ["eval", str(few), "--perplexity", str(text_file)],
        ["inspect", str(few)],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "has 2 experts, and its router picks 4 for a token" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
