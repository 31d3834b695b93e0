"""Recovery: the loss against loops, masks that any trainer keeps, trainings that stop, go on and are refused."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_barber import (
    BarberConfig,
    BarberRecoverer,
    BarberShrinker,
    BarberSparsifier,
    RecoverConfig,
    TokenWindows,
    verify_checkpoint,
)
from optimum_barber.base.errors import BarberError, FailedCheckError
from optimum_barber.checkpoints.experts import read_experts
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.structure import read_structure
from optimum_barber.cli import main
from optimum_barber.integrations.lora.settings import LoraSettings
from optimum_barber.integrations.lora.training import train_lora
from optimum_barber.integrations.training.settings import RecoverSettings
from optimum_barber.integrations.training.trainer import Learner
from optimum_barber.runs.recipe import run_recipe
from optimum_barber.runs.recipe.validation import RecipeError, read_recipe
from optimum_barber.runs.verify import verify_product
from optimum_barber.shrink.settings import ShrinkConfig
from optimum_barber.tensors.distillation import TOKENS, divergence

from .conftest import tiny_model, tiny_windows
from .test_experts import mixtral
from .test_experts_downstream import gpt2
from .test_lora_training import Interrupt

WINDOWS = TokenWindows(tiny_windows(8), "tokens", "calibration", 8)
OTHERS = {
    "gpt2": gpt2,
    "mixtral": mixtral,
    "phi3": partial(tiny_model, "phi3"),
}  # matrices that are no Linears' weights
HELD_OUT = TokenWindows(tiny_windows(4, seed=1), "held out", "evaluation", 4)
SETTINGS = {"steps": 6, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 0.01, "saving_steps": 2}


def saved(directory, model, tokenizer, **options):
    model.save_pretrained(directory, **options)
    tokenizer.save_pretrained(directory)
    return directory


def pruned(directory, dense, pattern="2:4"):
    config = BarberConfig(producer="magnitude", pattern=pattern, rebuild="none")
    sparsifier = BarberSparsifier.from_pretrained(dense, stream="never")
    sparsifier.sparsify(config, calibration=tiny_windows(), save_dir=directory, quiet=True)
    return directory


@pytest.fixture(scope="module")
def sparse(model_dir, tmp_path_factory):
    return pruned(tmp_path_factory.mktemp("recover") / "sparse", model_dir)


@pytest.fixture(scope="module")
def recovered(sparse, tmp_path_factory):
    output = tmp_path_factory.mktemp("recover") / "recovered"
    return output, recover(sparse, output).report


def recover(sparse, output, base=None, callbacks=(), held_out=HELD_OUT, **changes):
    config = RecoverConfig(**{**SETTINGS, **changes})
    return BarberRecoverer(sparse, base).recover(config, output, WINDOWS, held_out, quiet=True, callbacks=callbacks)


def slow_divergence(sparse, dense, temperature):
    total = 0.0
    for p_logits, q_logits in zip(dense.tolist(), sparse.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in logits] for logits in (p_logits, q_logits))
        p, q = ([value / sum(values) for value in values] for values in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(sparse)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tokens", [1, TOKENS + 3])
def test_the_divergence_and_its_gradient_are_those_of_the_definition(temperature, tokens):
    torch.manual_seed(0)
    sparse, dense = 2 * torch.randn(tokens, 7), 2 * torch.randn(tokens, 7)
    moved = sparse.clone().requires_grad_()
    loss = divergence(moved, dense, temperature)
    assert loss.item() == pytest.approx(slow_divergence(sparse, dense, temperature), rel=1e-5)
    loss.backward()
    token, entry, step = tokens - 1, 3, 1e-4
    beside = [sparse.double() for _ in range(2)]
    for logits, sign in zip(beside, (1, -1), strict=True):
        logits[token, entry] += sign * step
    slopes = [slow_divergence(logits, dense, temperature) for logits in beside]
    assert moved.grad[token, entry].item() == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-3)


def test_the_divergence_takes_batches_and_half_precision():
    torch.manual_seed(0)
    sparse, dense = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    flat = slow_divergence(sparse.flatten(0, 1), dense.flatten(0, 1), 1.0)
    half = sparse.bfloat16().requires_grad_()
    loss = divergence(half, dense.bfloat16())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(flat, rel=0.02)
    loss.backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.shape == half.shape
    assert divergence(dense, dense).item() == pytest.approx(0, abs=1e-6)


def test_tokens_that_neither_model_gives_do_not_count():
    sparse, dense = torch.randn(3, 7), torch.randn(3, 7)
    padded = [torch.cat([logits, torch.full((3, 2), -torch.inf)], 1) for logits in (sparse, dense)]
    leaf = padded[0].requires_grad_()
    loss = divergence(leaf, padded[1])
    loss.backward()
    assert loss.item() == pytest.approx(slow_divergence(sparse, dense, 1.0), rel=1e-5)
    assert leaf.grad.isfinite().all() and not leaf.grad[:, 7:].any()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_loss_of_text_is_the_mean_negative_log_likelihood(family, model_dir):
    model = mixtral(output_router_logits=True) if family == "mixtral" else tiny_model()
    tokens = HELD_OUT.tokens[:2]
    with torch.no_grad():
        chances = model(tokens).logits.log_softmax(-1)
        expected = 0.0
        for window, rows in zip(tokens, chances, strict=True):
            expected -= sum(float(rows[place - 1, window[place]]) for place in range(1, len(window)))
        expected /= tokens[:, 1:].numel()
        dense = tiny_model(seed=1, vocab_size=300)
        both = RecoverSettings(lm_weight=0.5, temperature=2.0)
        losses = {
            "lm": Learner(model, RecoverSettings(loss="lm"))(tokens, tokens)["loss"].item(),
            "both": Learner(model, both, dense)(tokens, tokens)["loss"].item(),
            "distill": Learner(model, RecoverSettings(temperature=2.0), dense)(tokens, tokens)["loss"].item(),
        }
    assert losses["lm"] == pytest.approx(expected, rel=1e-4)
    assert losses["both"] - losses["distill"] == pytest.approx(expected / 2, rel=1e-4)


def test_a_recovery_lowers_the_divergence_and_keeps_masks(recovered, sparse, model_dir):
    output, report = recovered
    before, after = PrunedModel.load(sparse), PrunedModel.load(output)
    outcome = verify_checkpoint(output)
    assert outcome.faults == [] and outcome.zeros == outcome.pruned > 0
    assert after.record.fingerprint == before.record.fingerprint == report["mask_fingerprint"]
    assert after.record.steps[-1]["name"] == "recover" and after.record.steps[-1]["dense_model"] == str(model_dir)
    assert [look["step"] for look in report["held_out_loss"]] == [0, 2, 4, 6]
    dense = AutoModelForCausalLM.from_pretrained(model_dir)
    losses = {}
    for name, model in {"before": before.model, "after": after.model}.items():
        logits = [m(HELD_OUT.tokens).logits.detach().flatten(0, 1) for m in (model, dense)]
        losses[name] = slow_divergence(*logits, 1.0)
    assert report["held_out_loss"][0]["loss"] == pytest.approx(losses["before"], rel=1e-3)
    assert min(look["loss"] for look in report["held_out_loss"]) == pytest.approx(losses["after"], rel=1e-3)
    assert losses["after"] < 0.9 * losses["before"]
    assert json.loads((output / "report.json").read_text())["recover"] == report
    assert not output.with_name("recovered.training").exists()
    for name, parameter in before.model.named_parameters():
        assert not torch.equal(parameter, after.model.get_parameter(name))


def test_only_the_chosen_parameters_move(sparse, tmp_path):
    recover(sparse, tmp_path / "out", parameters=["*.mlp.*"])
    before, after = PrunedModel.load(sparse).model, PrunedModel.load(tmp_path / "out").model
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)) == (".mlp." not in name)
    with pytest.raises(BarberError, match=r"parameters '\*\.w1' matches no parameter, such as model\.embed"):
        recover(sparse, tmp_path / "none", parameters=["*.w1"])


def test_the_dtype_of_each_parameter_and_shards_stay(tmp_path, tokenizer):
    model = tiny_model().bfloat16()
    dense = saved(tmp_path / "dense", model, tokenizer, max_shard_size="20KB")
    recover(pruned(tmp_path / "sparse", dense), tmp_path / "out", lm_weight=0.5, temperature=2.0)
    opened = PrunedModel.load(tmp_path / "out")
    assert opened.model.dtype == torch.bfloat16 and opened.reference.shard_bytes is not None
    assert verify_checkpoint(tmp_path / "out").faults == []


def test_a_checkpoint_in_half_precision_is_trained_against_float32_logits(tmp_path, tokenizer):
    dense = saved(tmp_path / "dense", tiny_model().bfloat16(), tokenizer)
    sparse = pruned(tmp_path / "sparse", dense)
    report = recover(sparse, tmp_path / "out", precision="highest").report
    logits = []
    for directory in (sparse, dense):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logits.append(model(HELD_OUT.tokens).logits.detach().flatten(0, 1))
    assert report["held_out_loss"][0]["loss"] == pytest.approx(slow_divergence(*logits, 1.0), rel=1e-4)
    assert report["perplexity_before"]["dtype"] == report["perplexity_after"]["dtype"] == "bfloat16"


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def assert_same_weights(one, other):
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("family", ["llama", "mixtral"])  # the files of one have other names than its memory
def test_an_interrupted_recovery_goes_on_to_the_same_bits(family, step, tmp_path, tokenizer):
    model, rate = (mixtral(), 1e-4) if family == "mixtral" else (tiny_model(), 0.01)
    sparse = pruned(tmp_path / "sparse", saved(tmp_path / "dense", model, tokenizer))
    whole, output = tmp_path / "whole", tmp_path / "out"
    recover(sparse, whole, learning_rate=rate)
    with pytest.raises(KeyboardInterrupt):
        recover(sparse, output, callbacks=[Interrupt(step)], learning_rate=rate)
    assert output.with_name("out.training").is_dir() and not output.exists()
    with pytest.raises(BarberError, match="other settings: remove it"):
        recover(sparse, output, learning_rate=0.03)
    recover(sparse, output, learning_rate=rate)
    assert_same_weights(whole, output)


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_recovery_has_as_much_patience_and_finds_its_best_weights(step, sparse, tmp_path):
    settings = {
        "steps": 40,
        "learning_rate": 0.05,
        "saving_steps": 1,
        "scheduler": "constant",
        "patience": 2,
        "warmup": 0,
    }
    whole = recover(sparse, tmp_path / "whole", **settings).report
    scratch = {name: tmp_path / name / "scratch" for name in ("before", "after")}
    with pytest.raises(KeyboardInterrupt):
        config = RecoverConfig(**{**SETTINGS, **settings})
        BarberRecoverer(sparse).recover(
            config,
            tmp_path / "out",
            WINDOWS,
            HELD_OUT,
            quiet=True,
            callbacks=[Interrupt(step)],
            scratch=scratch["before"],
        )
    scratch["before"].parent.rename(scratch["after"].parent)  # the Trainer keeps absolute paths
    report = (
        BarberRecoverer(sparse)
        .recover(config, tmp_path / "out", WINDOWS, HELD_OUT, quiet=True, scratch=scratch["after"])
        .report
    )
    for figures in (report, whole):
        del figures["seconds"], figures["loss"]  # a mean over the steps of one call
    assert report == whole
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_an_interrupt_leaves_checkpoints_where_the_folder_of_the_output_is_new(sparse, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        recover(sparse, tmp_path / "new" / "folder" / "out", callbacks=[Interrupt(3)])
    assert (tmp_path / "new" / "folder" / "out.training" / "checkpoint-2").is_dir()


def test_other_weights_under_the_same_names_are_another_run(sparse, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sparse, copy)
    with pytest.raises(KeyboardInterrupt):
        recover(copy, tmp_path / "out", callbacks=[Interrupt(3)])
    shutil.copytree(sparse, tmp_path / "other")
    save_file(weights_of(copy), copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BarberError, match="a run with other base_files: remove it to start anew"):
        recover(copy, tmp_path / "out")
    config = RecoverConfig(**SETTINGS)
    again = BarberRecoverer(copy).recover(config, tmp_path / "out", WINDOWS, HELD_OUT, overwrite=True, quiet=True)
    assert again.report["steps"] == 6 and not (tmp_path / "out.training").exists()


def test_folders_of_others_stay(sparse, tmp_path):
    folder = tmp_path / "out.training"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(BarberError, match="is not empty, and holds no training of ours: move it"):
        recover(sparse, tmp_path / "out")
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "file.training").write_text("mine")
    with pytest.raises(BarberError, match="is a file, where checkpoints of the training go"):
        recover(sparse, tmp_path / "file")


def test_a_second_run_on_the_same_checkpoints_is_refused(sparse, tmp_path):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(BarberError, match="is being written by another run"):
                recover(sparse, tmp_path / "out")

    recover(sparse, tmp_path / "out", steps=1, callbacks=[Second()])


def test_the_dense_model_is_no_place_to_write(model_dir, tmp_path):
    dense = tmp_path / "dense"
    shutil.copytree(model_dir, dense)
    config = RecoverConfig(**SETTINGS)
    sparse = pruned(tmp_path / "sparse", dense)
    with pytest.raises(BarberError, match="is the input"):
        BarberRecoverer(sparse).recover(config, dense, WINDOWS, HELD_OUT, overwrite=True, quiet=True)


def test_arguments_that_would_be_ignored_are_refused(sparse, model_dir, tmp_path):
    config = RecoverConfig(**SETTINGS)
    with pytest.raises(BarberError, match="windows and held_out go together"):
        BarberRecoverer(sparse).recover(config, tmp_path / "out", WINDOWS, quiet=True)
    with pytest.raises(BarberError, match="base .* goes with loss distill"):
        recover(sparse, tmp_path / "out", base=model_dir, loss="lm")
    with pytest.raises(BarberError, match="is no pruned or shrunk checkpoint"):
        recover(model_dir, tmp_path / "out", loss="lm")
    with pytest.raises(ValueError, match="temperature 3 goes with loss distill, not with lm"):
        RecoverConfig(loss="lm", temperature=3)
    with pytest.raises(ValueError, match="finite number"):
        RecoverConfig(temperature=math.inf)
    tokens = BarberRecoverer(sparse).recover(config, tmp_path / "out", WINDOWS.tokens, HELD_OUT.tokens, quiet=True)
    assert tokens.report["windows"]["fingerprint"] == WINDOWS.fingerprint


def test_a_recovery_killed_behind_its_last_step_does_not_train_again(sparse, recovered, tmp_path, monkeypatch):
    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("optimum_barber.integrations.training.recover.save_model", kill)
        recover(sparse, tmp_path / "out")
    report = recover(sparse, tmp_path / "out", callbacks=[Interrupt(1)]).report
    assert {**report, "seconds": 0} == {**recovered[1], "seconds": 0}
    assert_same_weights(recovered[0], tmp_path / "out")


def test_the_weights_of_the_lowest_held_out_loss_are_written_and_patience_ends_the_training(sparse, tmp_path):
    settings = {
        "steps": 40,
        "learning_rate": 0.05,
        "saving_steps": 1,
        "scheduler": "constant",
        "patience": 2,
        "warmup": 0,
    }
    report = recover(sparse, tmp_path / "out", **settings).report
    looks = {look["step"]: look["loss"] for look in report["held_out_loss"]}
    best = min(looks, key=looks.get)
    assert report["steps"] == best + 2 < 40
    exact = recover(sparse, tmp_path / "best", **{**settings, "steps": best}).report
    assert exact["held_out_loss"][-1]["loss"] == looks[best]
    assert_same_weights(tmp_path / "out", tmp_path / "best")


def test_a_training_without_gain_writes_nothing(sparse, tmp_path):
    with pytest.raises(FailedCheckError, match="training did not lower the held-out loss of .* lower learning rate"):
        recover(sparse, tmp_path / "out", learning_rate=10.0)
    with pytest.raises(BarberError, match="training diverged: learning rate 1e\\+30 is too high"):
        recover(sparse, tmp_path / "other", learning_rate=1e30)
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()
    assert recover(sparse, tmp_path / "out").report["steps"] == 6  # as advised


def test_a_shrunk_model_learns_from_the_one_before_the_cut(model_dir, tmp_path):
    shrinker = BarberShrinker.from_pretrained(model_dir)
    shrinker.shrink(ShrinkConfig(remove=0.3), tiny_windows(), save_dir=tmp_path / "small", quiet=True)
    report = recover(tmp_path / "small", tmp_path / "out").report
    assert report["dense_model"] == str(model_dir) and report["mask_fingerprint"] is None
    assert [step["name"] for step in read_structure(tmp_path / "out").steps] == ["recover"]
    assert verify_product(tmp_path / "out").faults == []
    shrinker = BarberShrinker.from_pretrained(tmp_path / "small")
    shrinker.shrink(ShrinkConfig(remove=0.2), tiny_windows(), save_dir=tmp_path / "smaller", quiet=True)
    assert recover(tmp_path / "smaller", tmp_path / "twice").report["dense_model"] == str(model_dir)
    masked = pruned(tmp_path / "masked", tmp_path / "small")
    assert recover(masked, tmp_path / "both").report["dense_model"] == str(model_dir)


def test_the_record_of_lost_experts_goes_on(tmp_path, tokenizer):
    model = mixtral()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # so that experts matter
    dense = saved(tmp_path / "dense", model, tokenizer)
    shrinker = BarberShrinker.from_pretrained(dense)
    shrinker.shrink(ShrinkConfig(scorer="magnitude", remove_experts=0.25), save_dir=tmp_path / "small", quiet=True)
    recover(tmp_path / "small", tmp_path / "once", learning_rate=1e-3, held_out=WINDOWS)
    report = recover(tmp_path / "once", tmp_path / "twice", learning_rate=1e-4, held_out=WINDOWS).report
    assert report["dense_model"] == str(dense)
    assert [step["name"] for step in read_experts(tmp_path / "twice").steps] == ["recover", "recover"]
    checked = verify_product(tmp_path / "twice")
    assert checked.faults == [] and "weights have changed since, by recover" in str(checked)


def test_a_dense_model_and_another_vocabulary_are_refused(sparse, model_dir, tmp_path, tokenizer):
    with pytest.raises(BarberError, match="does not say which dense model it was made from: give it as base"):
        recover(model_dir, tmp_path / "out")
    other = saved(tmp_path / "other", tiny_model(vocab_size=320), tokenizer)
    with pytest.raises(BarberError, match="has a vocabulary of 320 tokens, the model has 300"):
        recover(sparse, tmp_path / "out", base=other)


def test_an_adapter_can_learn_from_the_dense_model_too(sparse, model_dir, tmp_path):
    settings = LoraSettings(rank=3, steps=6, batch_size=2, learning_rate=0.02, logging_steps=2, loss="distill")
    report = train_lora(sparse, tmp_path / "adapter", settings, WINDOWS, HELD_OUT, quiet=True)
    assert report["dense_model"] == str(model_dir)
    assert report["loss"][-1]["loss"] < report["loss"][0]["loss"]


def test_the_command_says_what_it_did_and_refuses_in_one_line(sparse, text_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["recover", str(sparse), "--calibration", str(text_file), "--sequence-length", "16", "--steps", "3"]
    assert main([*words, "--learning-rate", "0.01", "--saving-steps", "1", "-o", out]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == ["held-out loss", "held-out perplexity", "steps", "written to"]
    assert main([*words, "-o", out]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, "--loss", "kd", "-o", out, "--overwrite"]) == 2
    assert "loss 'kd'" in capsys.readouterr().err
    assert main([*words, "--temperature", "0", "-o", out, "--overwrite"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


RECIPE = """\
model: {model}
calibration: {{texts: [{text}], samples: 4, sequence_length: 16}}
stages:
{stages}
output: {output}
"""


def recipe(tmp_path, model, text, *stages):
    path = tmp_path / "recipe.yaml"
    lines = "\n".join(f"  - {stage}" for stage in stages)
    path.write_text(RECIPE.format(model=model, text=text, stages=lines, output=tmp_path / "run"), encoding="utf-8")
    return path


@pytest.mark.usefixtures("no_charts")
def test_a_recipe_prunes_recovers_and_quantizes(model_dir, text_file, tmp_path):
    recovery = "recover: {steps: 4, learning_rate: 0.01, saving_steps: 2}"
    stages = ["prune: {pattern: 2:4}", recovery, "quantize: {group_size: 16}", "report"]
    result = run_recipe(recipe(tmp_path, model_dir, text_file, *stages), quiet=True)
    figures = result.stages["02-recover"]
    assert figures["zeros"] == figures["pruned"] > 0 and figures["held_out_loss"].keys() == {"0", "2", "4"}
    assert figures["held_out_loss"]["4"] < figures["held_out_loss"]["0"]


def test_recipes_with_nothing_to_recover_are_refused(model_dir, text_file, tmp_path):
    for stage in ("recover", "recover: {loss: lm}", "lora: {loss: distill}"):
        with pytest.raises(RecipeError, match="has nothing to recover: no stage before it prunes or shrinks"):
            read_recipe(recipe(tmp_path, model_dir, text_file, stage))


@pytest.mark.usefixtures("no_charts")
def test_a_recipe_killed_while_it_recovers_goes_on_to_the_same_bits(model_dir, text_file, tmp_path, monkeypatch):
    stages = ["prune: {pattern: 2:4}", "recover: {steps: 4, learning_rate: 0.01, saving_steps: 1}"]
    path = recipe(tmp_path, model_dir, text_file, *stages)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("optimum_barber.runs.recipe.stages.tune._loss_to", lambda context: Interrupt(2))
        run_recipe(path, quiet=True)
    resumed = run_recipe(path, quiet=True)
    whole = run_recipe(path, [f"output={tmp_path / 'whole'}"], quiet=True)
    first, second = (weights_of(result.output / "02-recover" / "model") for result in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
