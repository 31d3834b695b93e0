"""`shrink -> lora -> merge -> evaluate` on a tiny model: what it gains, and that a kill costs nothing but time."""

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_barber.checkpoints.structure import read_structure
from optimum_barber.runs.recipe import run_recipe
from optimum_barber.runs.recipe.stages import tune

SETTINGS = [
    "shrink.latency=false", "calibration.samples=4", "calibration.sequence_length=32", "evaluate[1].windows=4",
    "evaluate[2].windows=4", "lora.steps=12", "lora.rank=4", "lora.learning_rate=0.01", "lora.sequence_length=32",
    "lora.saving_steps=3",
]  # fmt: skip


class Killed(TrainerCallback):
    """Ends the process's work after a step, as a signal would."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 7:
            raise KeyboardInterrupt


def run(model, output):
    return run_recipe("smaller", [f"model={model}", f"output={output}", *SETTINGS], quiet=True)


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    """The shipped recipe, run through."""
    return run(model_dir, tmp_path_factory.mktemp("recovery") / "out")


def actual(result, stage):
    return result.stages[stage]["model"]["perplexity"]["pydoc"]["perplexity"]


def test_tuning_lowers_the_perplexity_of_the_smaller_model(whole):
    lora = whole.stages["03-lora"]
    assert lora["steps"] == 12
    assert lora["held_out_perplexity_after"] < 0.9 * lora["held_out_perplexity_before"]
    assert actual(whole, "05-evaluate") < 0.9 * actual(whole, "02-evaluate")
    assert whole.stages["05-evaluate"]["dense"] == whole.stages["02-evaluate"]["dense"]


def test_the_tuned_model_is_as_small_and_says_so(whole):
    record = read_structure(whole.model)
    assert [step["name"] for step in record.steps] == ["lora-merge"]
    model = AutoModelForCausalLM.from_pretrained(whole.model)
    assert model.num_parameters() == whole.stages["01-shrink"]["parameters_after"]
    assert record.kept == read_structure(whole.base).kept


def test_killed_while_it_tunes_it_ends_with_the_same_bits(whole, model_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_loss_to", lambda work: Killed())
        with pytest.raises(KeyboardInterrupt):
            run(model_dir, tmp_path / "out")
    assert not (tmp_path / "out" / "03-lora").exists()
    again = run(model_dir, tmp_path / "out")
    assert again.reused == ["01-shrink", "02-evaluate"]
    assert again.stages["05-evaluate"]["model"]["perplexity"]["pydoc"]["perplexity"] == actual(whole, "05-evaluate")
    first, second = (load_file(f"{result.model}/model.safetensors") for result in (whole, again))
    assert all(first[name].equal(second[name]) for name in first)
