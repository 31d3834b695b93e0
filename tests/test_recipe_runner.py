"""Running recipes: stages on disk, reuse, resume after a kill, records, trackers."""

import json
import shutil

import pytest
from filelock import FileLock

from optimum_barber.base.errors import BarberError, FailedCheckError
from optimum_barber.checkpoints.record import read_record
from optimum_barber.checkpoints.verify import Verification
from optimum_barber.cli import main
from optimum_barber.runs.recipe import run_recipe
from optimum_barber.runs.recipe.document import find_recipe
from optimum_barber.runs.recipe.runner import _fingerprint_of
from optimum_barber.runs.recipe.stage import STAGES
from optimum_barber.runs.recipe.stages.prune import PruneStage
from optimum_barber.runs.recipe.validation import read_recipe

from .killer import killed

pytestmark = pytest.mark.usefixtures("no_charts")
RECIPE = """\
name: tiny
model: {model}
calibration: {{texts: [{text}], samples: 4, sequence_length: 32}}
stages:
  - prune: {{producer: sparsegpt, pattern: 2:4}}
  - rebuild: {{rounds: 2}}
  - evaluate: {{perplexity: [{text}], windows: 2}}
  - report
output: {output}
"""


@pytest.fixture
def recipe(tmp_path, model_dir, text_file):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=model_dir, text=text_file, output=tmp_path / "out"), encoding="utf-8")
    return path


def kept(directory):
    """Every weight and mask file that a run left, by its path within the run."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))}


def test_a_run_leaves_every_stage_and_a_record(recipe, tmp_path, text_file):
    result = run_recipe(recipe, quiet=True)
    out = tmp_path / "out"
    assert [path.name for path in sorted(out.iterdir())] == [
        ".lock", "01-prune", "02-rebuild", "03-evaluate", "04-report", "run.json",
    ]  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["model"] == result.model == str(out / "02-rebuild" / "model")
    rebuilt = record["stages"]["02-rebuild"]
    assert rebuilt["zeros"] == rebuilt["pruned"] == record["stages"]["01-prune"]["zeros"]
    assert rebuilt["error_after"] < rebuilt["error_before"]
    page = (out / "04-report" / "report.md").read_text()
    assert f"| dense | perplexity, {text_file}, 2 windows of 32 |" in page
    assert f"| 03-evaluate | perplexity, {text_file}" in page


def test_rebuild_keeps_the_weights_that_the_producer_changed(recipe):
    result = run_recipe(recipe, quiet=True)
    first, second = result.stages["01-prune"], result.stages["02-rebuild"]
    assert second["error_before"] == pytest.approx(first["error_after"], rel=0.5)
    assert read_record(result.model).pattern == "2:4"


def test_a_second_run_redoes_only_what_changed(recipe):
    first = run_recipe(recipe, quiet=True)
    again = run_recipe(recipe, quiet=True)
    assert again.reused == list(first.stages)
    assert again.stages == first.stages
    changed = run_recipe(recipe, ["rebuild.rounds=1"], quiet=True)
    assert changed.reused == ["01-prune"]
    back = run_recipe(recipe, ["evaluate.windows=3", "rebuild.rounds=1"], quiet=True)
    assert back.reused == ["01-prune", "02-rebuild"]


def test_the_order_of_globs_counts(recipe):
    shared = read_recipe(recipe)
    globs = {"*.down_proj": 8, "*proj": 2}
    stages = [STAGES["quantize"](bits_of=bits_of) for bits_of in (globs, dict(reversed(globs.items())))]
    assert len({_fingerprint_of(shared, stage, "start") for stage in stages}) == 2


def test_a_changed_text_or_model_is_noticed(recipe, tmp_path, text_file):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    settings = [f"calibration.texts=[{text}]"]
    run_recipe(recipe, settings, quiet=True)
    assert len(run_recipe(recipe, settings, quiet=True).reused) == 4
    text.write_text(text_file.read_text()[::-1])
    assert run_recipe(recipe, settings, quiet=True).reused == []


def test_dry_run_shows_the_plan_and_does_nothing(recipe, tmp_path, capsys):
    assert main(["run", str(recipe), "--dry-run", "--set", "prune.pattern=1:4"]) == 0
    said = capsys.readouterr().out
    assert "01-prune" in said and "pattern 1:4" in said and "memory" in said
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did(recipe, capsys):
    assert main(["run", str(recipe), "--quiet"]) == 0
    assert main(["run", str(recipe), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "01-prune (as before): sparsity 0.5" in said
    assert said.splitlines()[-1].startswith("model: ")
    assert main(["run", "--list"]) == 0
    assert "paper-table-1-wanda" in capsys.readouterr().out


def test_a_failed_stage_leaves_no_half_result_and_is_on_record(recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise BarberError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(PruneStage, "run", fail)
        with pytest.raises(BarberError, match="no luck"):
            run_recipe(recipe, quiet=True)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "no luck")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "run.json"]
    assert run_recipe(recipe, quiet=True).reused == []


def test_a_lost_zero_fails_the_stage_with_status_1(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "optimum_barber.runs.recipe.runner.verify_product", lambda *_, **__: Verification("2:4", faults=["x: lost"])
    )
    assert main(["run", str(recipe), "--quiet"]) == 1
    assert "stage 01-prune lost what it should keep: x: lost" in capsys.readouterr().err
    assert not (tmp_path / "out" / "01-prune").exists()
    assert FailedCheckError.status == 1


def test_an_output_of_others_is_left_alone(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(BarberError, match="holds something that is no run"):
        run_recipe(recipe, quiet=True)


def test_two_runs_do_not_share_an_output(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(BarberError, match="another run"):
        run_recipe(recipe, quiet=True)


def test_a_stage_without_its_model_is_done_again(recipe, tmp_path):
    run_recipe(recipe, quiet=True)
    shutil.rmtree(tmp_path / "out" / "02-rebuild" / "model")
    assert run_recipe(recipe, quiet=True).reused == ["01-prune", "03-evaluate", "04-report"]


def test_trackers_follow_the_run(recipe, tmp_path, text_file):
    pytest.importorskip("tensorboard")
    run_recipe(recipe, track=["tensorboard"], quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = set()
    for folder in {path.parent for path in (tmp_path / "out" / "tracking").rglob("events.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert {"01-prune/error_after", "02-rebuild/sparsity", f"03-evaluate/perplexity/{text_file}/perplexity"} <= tags


def test_a_missing_tracker_is_named(recipe, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(BarberError, match="pip install mlflow"):
        run_recipe(recipe, track=["mlflow"], quiet=True)


TUNE = """\
  - lora: {steps: 6, batch_size: 2, rank: 2, saving_steps: 2}
  - merge
  - quantize: {group_size: 16}
"""


def test_killed_at_random_moments_it_ends_with_the_same_files(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("  - report\n", TUNE), encoding="utf-8")
    said = killed(tmp_path, 5, "run", recipe, "--quiet", "--set", f"output={tmp_path}/OUT")
    assert kept(tmp_path / "out") == kept(tmp_path / "whole")
    assert len([name for name in kept(tmp_path / "out") if "sparsity_masks" in name]) == 4
    assert said[-1].startswith("5 kills")


def test_shipped_recipes_are_found_by_name():
    assert find_recipe("demo").name == "demo.yaml"
    with pytest.raises(BarberError, match="did you mean 'demo'"):
        find_recipe("demi")
