"""The whole chain on a tiny model: prune, rebuild, LoRA, merge, quantize; not one zero is lost on the way."""

import pytest

from optimum_barber.checkpoints.record import MaskFile, read_record
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.runs.recipe import run_recipe

RECIPE = """\
name: chain
model: {model}
calibration: {{texts: [pydoc], samples: 4, sequence_length: 32}}
stages:
  - prune: {{producer: wanda, pattern: 2:4}}
  - rebuild: {{rounds: 1}}
  - lora: {{steps: 4, batch_size: 2, rank: 2, logging_steps: 1, saving_steps: 2}}
  - evaluate: {{perplexity: [pydoc], windows: 2}}
  - merge
  - quantize: {{method: gptq, bits: 4, group_size: 16}}
  - evaluate: {{perplexity: [pydoc], windows: 2}}
  - report
output: {output}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("chain")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model_dir, output=folder / "out"), encoding="utf-8")
    return run_recipe(path, quiet=True)


def test_every_stage_keeps_every_zero(run):
    made = {name: figures for name, figures in run.stages.items() if "zeros" in figures}
    assert [name.split("-")[1] for name in made] == ["prune", "rebuild", "lora", "merge", "quantize"]
    assert len({figures["zeros"] for figures in made.values()}) == 1
    assert all(figures["zeros"] == figures["pruned"] for figures in made.values())


def test_the_last_model_holds_the_rebuilt_masks(run):
    model = run.output / "06-quantize" / "model"
    assert str(model) == run.model
    assert verify_checkpoint(model).faults == []
    masks, weights = MaskFile(model / "sparsity_masks.safetensors"), SafetensorsWeights.open(model)
    rebuilt = MaskFile(run.output / "02-rebuild" / "model" / "sparsity_masks.safetensors")
    for name, mask in masks.items():
        assert mask.sha256 == rebuilt[name].sha256
        assert not weights.linear(name)[~mask.unpack()].any()
    assert [step["name"] for step in read_record(model).steps] == ["lora-merge", "quantize"]


def test_every_model_is_measured_beside_the_dense_one(run):
    adapter, quantized = run.stages["04-evaluate"], run.stages["07-evaluate"]
    assert adapter["dense"] == quantized["dense"]
    assert adapter["model"]["perplexity"]["pydoc"]["perplexity"] > 1
    assert quantized["model"]["perplexity"]["pydoc"]["windows"] == 2
    assert (run.output / "08-report" / "report.md").read_text().count("| dense |") == 1


def test_lora_reports_its_loss_and_held_out_perplexity(run):
    figures = run.stages["03-lora"]
    assert list(figures["loss"]) == ["1", "2", "3", "4"]
    assert figures["held_out_perplexity_after"] < figures["held_out_perplexity_before"]


def test_nothing_unfinished_is_left(run):
    assert not (run.output / ".unfinished").exists()
    assert not list(run.output.rglob("*.partial"))
