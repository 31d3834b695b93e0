"""Adapters trained, interrupted, reopened, merged and verified; refused where they would compute something else."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_barber import BarberConfig, BarberSparsifier, TokenWindows, perplexity, verify_checkpoint
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.card.adapter import adapter_metadata
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.integrations.lora.checkpoint import load_adapter, merge_lora, verify_adapter
from optimum_barber.integrations.lora.settings import LoraSettings
from optimum_barber.integrations.lora.training import train_lora

from .conftest import tiny_model, tiny_windows

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lora_training.json", "sparsity_adapter.json"]
SETTINGS = {"rank": 3, "steps": 6, "batch_size": 2, "learning_rate": 0.02, "dropout": 0.1, "logging_steps": 2}
WINDOWS = TokenWindows(tiny_windows(5), "tokens", "calibration", 5)


def pruned(directory, tokenizer, model=None, sparsity=0.5):
    config = BarberConfig(producer="magnitude", sparsity=sparsity, rebuild="none")
    sparsifier = BarberSparsifier(model or tiny_model(), tokenizer)
    sparsifier.sparsify(config, calibration=tiny_windows(), save_dir=directory, quiet=True)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return pruned(tmp_path_factory.mktemp("lora") / "base", tokenizer)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("lora") / "adapter"
    return output, train(base, output, held_out=WINDOWS)


def train(base, output, held_out=None, callbacks=(), scratch=None, **changes):
    settings = LoraSettings(**{**SETTINGS, **changes})
    return train_lora(base, output, settings, WINDOWS, held_out, quiet=True, callbacks=callbacks, scratch=scratch)


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_report_says_what_happened(trained, base, capsys):
    output, report = trained
    assert sorted(path.name for path in output.iterdir()) == FILES
    assert not output.with_name("adapter.training").exists()
    assert report == json.loads((output / "lora_training.json").read_text())
    assert report["steps"] == 6 and [point["step"] for point in report["loss"]] == [2, 4, 6]
    assert report["loss"][0]["loss"] > report["loss"][-1]["loss"]
    assert report["perplexity_after"]["perplexity"] < report["perplexity_before"]["perplexity"]
    assert report["perplexity_before"] == perplexity(PrunedModel.load(base).model, WINDOWS, quiet=True).as_dict()
    assert report["mask_fingerprint"] == PrunedModel.load(base).record.fingerprint
    assert capsys.readouterr().out == ""


def test_its_card_says_what_it_belongs_on_and_how_it_was_trained(trained, base):
    output, report = trained
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["optimum-barber", "lora", "sparsity"]
    assert card.data.base_model is None  # a folder is no name on the Hub
    assert f"fingerprint {report['mask_fingerprint']}" in card.text and str(base) not in card.text
    assert "rank 3, alpha 32, dropout 0.1" in card.text and "5 windows of 16 tokens" in card.text
    before, after = (report[f"perplexity_{when}"]["perplexity"] for when in ("before", "after"))
    assert f"{before:.3f} before, {after:.3f} after" in card.text
    first, second = card.text.split("```bash\n")[1].split("```")[0].splitlines()
    assert first.startswith("optimum-barber prune ") and first.endswith("-o step-1  # on windows from Python")
    assert second.startswith("# step-1 -> ADAPTER, by the recipe stage ") and '"rank": 3' in second


def test_the_card_of_an_adapter_on_a_model_of_the_hub():
    card = {"license": "mit", "language": ["en"], "tags": ["other"]}
    assert adapter_metadata("owner/name", card, masked=False) == {
        "license": "mit", "language": ["en"], "pipeline_tag": "text-generation", "base_model": "owner/name",
        "base_model_relation": "adapter", "library_name": "peft", "tags": ["optimum-barber", "lora"],
    }  # fmt: skip


def test_a_reloaded_adapter_computes_the_same(trained, base):
    output, report = trained
    adapter = load_adapter(output)
    assert perplexity(adapter, WINDOWS, quiet=True).as_dict() == report["perplexity_after"]
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    on_given = load_adapter(output, AutoModelForCausalLM.from_pretrained(base), is_trainable=True)
    assert sum(parameter.requires_grad for parameter in on_given.parameters()) == 2 * 14
    on_given.save_pretrained(output.with_name("again"))
    again = load_adapter(output.with_name("again"))
    assert torch.equal(again(WINDOWS.tokens).logits, adapter(WINDOWS.tokens).logits)


def test_merging_keeps_zeros_masks_and_dtype_and_changes_kept_weights(trained, base, tmp_path):
    output, _ = trained
    merge_lora(output, tmp_path / "merged")
    before, after = PrunedModel.load(base), PrunedModel.load(tmp_path / "merged")
    outcome = verify_checkpoint(tmp_path / "merged")
    assert outcome.faults == [] and outcome.zeros == outcome.pruned > 0
    assert after.record.fingerprint == before.record.fingerprint
    assert [step["name"] for step in after.record.steps] == ["lora-merge"]
    for name in after.masks:
        old, new, keep = (*(m.model.get_parameter(f"{name}.weight") for m in (before, after)), after.keep(name))
        assert (old[keep] != new[keep]).float().mean() > 0.9 and new.dtype == old.dtype
    expected = load_adapter(output)(WINDOWS.tokens).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain(WINDOWS.tokens).logits, expected)
    assert verify_adapter(output).zeros == outcome.zeros
    with pytest.raises(BarberError, match="is merged into model .* already"):
        load_adapter(output, tmp_path / "merged")


def test_merging_keeps_shards_generation_config_and_half_precision(tmp_path, tokenizer):
    model = tiny_model().bfloat16()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = BarberConfig(producer="magnitude", pattern="2:4", rebuild="none")
    BarberSparsifier.from_pretrained(tmp_path / "dense", stream="never").sparsify(
        config, calibration=tiny_windows(), save_dir=tmp_path / "base", quiet=True
    )
    train(tmp_path / "base", tmp_path / "adapter", steps=1, use_rslora=True)
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    merged = PrunedModel.load(tmp_path / "merged")
    assert merged.model.dtype == torch.bfloat16 and merged.model.generation_config.max_new_tokens == 7
    assert merged.reference.shard_bytes == PrunedModel.load(tmp_path / "base").reference.shard_bytes
    assert verify_checkpoint(tmp_path / "merged").faults == []


OPEN_PLAINLY = """
import sys, transformers
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
base, adapter = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base)
ways = [
    lambda: PeftModel.from_pretrained(model, adapter),
    lambda: PeftConfig.from_pretrained(adapter),
    lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    lambda: transformers.AutoModelForCausalLM.from_pretrained(adapter),
    lambda: model.load_adapter(adapter),
]
for way in ways:
    try:
        way()
        print("opened")
    except KeyError as error:
        print(error)
assert "optimum_barber" not in sys.modules
"""


def test_plain_peft_fails_loudly_instead_of_computing_something_else(trained, base):
    command = [sys.executable, "-W", "ignore", "-c", OPEN_PLAINLY, str(base), str(trained[0])]
    answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert answers == ["'OPTIMUM_BARBER_MASKED_LORA'"] * 5
    with pytest.raises(KeyError, match="OPTIMUM_BARBER_MASKED_LORA"):  # with our package imported just as well
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained[0])
    config = json.loads((trained[0] / "adapter_config.json").read_text())
    assert not {"r", "lora_alpha", "target_modules"} & set(config)  # for readers that never look at the type


def test_an_adapter_of_other_masks_is_refused_with_both_fingerprints(trained, base, model_dir, tmp_path, tokenizer):
    other = pruned(tmp_path / "other", tokenizer, sparsity=0.6)
    first, second = (PrunedModel.load(path).record.fingerprint for path in (base, other))
    with pytest.raises(BarberError, match=f"{first}.*{second}"):
        load_adapter(trained[0], other)
    with pytest.raises(BarberError, match=f"{first}, model .* has none"):
        load_adapter(trained[0], model_dir)
    assert f"{first}, model {other} has {second}" in verify_adapter(trained[0], other).faults[0]
    with pytest.raises(BarberError, match="not loaded from anywhere"):
        load_adapter(trained[0], tiny_model())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("sparsity_adapter.json", {"format_version": 2}, "format version 2; known is 1"),
        ("sparsity_adapter.json", {"surprise": 1}, "is no adapter binding"),
        ("sparsity_adapter.json", None, "has no sparsity_adapter.json"),
        ("adapter_config.json", {"peft_type": "IA3"}, "peft_type 'IA3': legal are"),
        ("adapter_config.json", {"masked_lora": {"nonsense": 1}}, "is no LoRA configuration"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
    ],
)
def test_broken_adapters_are_refused_in_one_line(trained, tmp_path, file, change, message):
    path = shutil.copytree(trained[0], tmp_path / "adapter") / file
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BarberError, match=message) as caught:
        load_adapter(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [3, 5, 6])
def test_an_interrupted_training_goes_on_to_the_same_bits(trained, base, tmp_path, step):
    output, folder = tmp_path / "adapter", tmp_path / "scratch"
    with pytest.raises(KeyboardInterrupt):
        train(base, output, callbacks=[Interrupt(step)], scratch=folder, saving_steps=2)
    assert folder.is_dir() and not output.exists()
    torn = folder / "checkpoint-99"  # as a kill within the Trainer's own saving leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    with pytest.raises(BarberError, match="other settings: remove it"):
        train(base, output, scratch=folder, saving_steps=2, learning_rate=0.03)
    report = train(base, output, scratch=folder, saving_steps=2)
    assert report["steps"] == 6 and len(report["loss"]) == 3 and not folder.exists()
    first, second = (load_file(path / "adapter_model.safetensors") for path in (trained[0], output))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_training_killed_after_its_last_step_takes_no_further_one(trained, base, tmp_path, monkeypatch):
    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("optimum_barber.integrations.lora.training.save_adapter", kill)
        train(base, tmp_path / "adapter", held_out=WINDOWS)
    report = train(base, tmp_path / "adapter", held_out=WINDOWS)
    assert {**report, "seconds": 0} == {**trained[1], "seconds": 0}


def test_a_dense_model_gets_a_plain_adapter_that_peft_opens(model_dir, tmp_path):
    report = train(model_dir, tmp_path / "adapter", held_out=WINDOWS, gradient_checkpointing=True)
    assert report["mask_fingerprint"] is None and not (tmp_path / "adapter" / "sparsity_adapter.json").exists()
    adapter = load_adapter(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter")
    logits = adapter(WINDOWS.tokens).logits
    assert torch.equal(plain(WINDOWS.tokens).logits, logits)
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    merged = PrunedModel.load(tmp_path / "merged")
    assert merged.record is None and verify_adapter(tmp_path / "adapter").faults == []
    torch.testing.assert_close(merged.model(WINDOWS.tokens).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_plain_adapter_is_refused_on_a_pruned_model(model_dir, base, tmp_path):
    train(model_dir, tmp_path / "adapter", steps=1)
    with pytest.raises(BarberError, match=f"under masks none, .* {PrunedModel.load(base).record.fingerprint}"):
        merge_lora(tmp_path / "adapter", tmp_path / "merged", base)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_gradient_checkpointing_changes_no_bit(precision, base, tmp_path):
    settings = {"dropout": 0.0, "precision": precision}
    train(base, tmp_path / "adapter", gradient_checkpointing=True, **settings)
    train(base, tmp_path / "other", **settings)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "other"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_targets_are_globs(base, tmp_path):
    train(base, tmp_path / "adapter", steps=1, targets=["*.q_proj", "model.layers.1.*"])
    layers = {key.split(".lora_")[0] for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    assert len(layers) == 1 + 7
    with pytest.raises(BarberError, match=r"target '\*\.w1' matches no Linear, such as model\.layers\.0"):
        train(base, tmp_path / "none", targets=["*.w1"])
    assert train(base, tmp_path / "none", steps=1)["steps"] == 1


def test_a_diverged_training_writes_nothing(base, tmp_path):
    with pytest.raises(BarberError, match="training diverged: learning rate 1e\\+30 is too high"):
        train(base, tmp_path / "adapter", learning_rate=1e30)
    assert not (tmp_path / "adapter").exists()


def test_settings_refuse_dora_and_unknown_names():
    with pytest.raises(ValueError, match="DoRA rescales whole rows"):
        LoraSettings(use_dora=True)
    with pytest.raises(ValueError, match="Extra inputs"):
        LoraSettings(ranks=3)
    assert all(field.description for field in LoraSettings.model_fields.values())
