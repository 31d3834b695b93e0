"""`optimum-barber lm-eval`: what its model arguments mean, its cache, its results."""

import json
import os
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, is_initialized
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json
from optimum_barber.base.launcher import environment_of
from optimum_barber.checkpoints.record import read_record
from optimum_barber.cli import build_parser, main
from optimum_barber.cli.prune import config_from
from optimum_barber.integrations.lm_eval import checkpoint as lm_eval_checkpoint
from optimum_barber.integrations.lm_eval import run as lm_eval_run
from optimum_barber.integrations.lm_eval.arguments import barber_config
from optimum_barber.integrations.lm_eval.checkpoint import checkpoint_for
from optimum_barber.integrations.lm_eval.run import run_harness
from optimum_barber.runs.tasks.evaluate import evaluate_tasks

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from lm_eval.models.huggingface import HFLM

from optimum_barber.integrations.lm_eval import model as lm_eval_model
from optimum_barber.integrations.lm_eval.model import BarberLM
from optimum_barber.runs.tasks.lm import SparseLM

from . import ranks

ROW = {"question": "What is a list?", "choices": ["a mutable sequence", "a loop"], "gold": 0}
MAGNITUDE = "producer=magnitude,sparsity=0.5,rebuild=none"


@pytest.fixture
def tasks(tmp_path):
    """A file of one question and one of text."""
    choice, rolling = tmp_path / "questions.jsonl", tmp_path / "text.txt"
    choice.write_text(json.dumps(ROW))
    rolling.write_text("A list is a sequence.\nThe assert statement is a way to check.\n")
    return [f"choice:{choice}", f"rolling:{rolling}"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUM_BARBER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def harness(model_dir, tmp_path, monkeypatch):
    """The command without lm-eval's index of ten thousand tasks, and what it wrote as results."""
    import lm_eval.tasks
    import lm_eval.utils

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", True)  # no handler on a stream that ends with the test
    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "false")

    def run(model, arguments, tasks, status=0):
        output = tmp_path / "results"
        command = ["lm-eval", "run", "--model", model, "--model_args", f"pretrained={model_dir},{arguments}".strip(",")]
        assert main([*command, "--tasks", *tasks, "--output_path", str(output)]) == status
        written = max(output.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns, default=None)
        return json.loads(written.read_text()) if written else None

    return run


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ({"sparsity": 0.5}, ["--sparsity", "0.5"]),
        (
            {"pattern": "2:4", "producer": "sparsegpt", "damping": 0.1, "rebuild": "none", "seed": 3},
            ["--pattern", "2:4", "--producer", "sparsegpt", "--producer-arg", "damping=0.1", "--rebuild", "none",
             "--seed", "3"],
        ),
        (
            {"sparsity": 0.5, "preset": "published-code", "granularity": "block", "rebuild_ratio": 0.1, "rounds": 2},
            ["--sparsity", "0.5", "--preset", "published-code", "--granularity", "block", "--rebuild-ratio", "0.1",
             "--rounds", "2"],
        ),
        (
            {"sparsity": 0.5, "calibration": "[pydoc,'a.txt']", "ignore": "*.up_proj", "samples": 4},
            ["--sparsity", "0.5", "--calibration", "pydoc", "--calibration", "a.txt", "--ignore", "*.up_proj",
             "--samples", "4"],
        ),
        ({"producer": "existing", "sparse_model": "S"}, ["--producer", "existing", "--sparse-model", "S"]),
        ({"producer": "masks", "masks": "F"}, ["--producer", "masks", "--masks", "F"]),
        ({"masks": "F"}, ["--producer", "masks", "--masks", "F", "--rebuild", "none"]),
    ],
)  # fmt: skip
def test_model_arguments_mean_what_the_flags_mean(arguments, flags):
    meant = config_from(build_parser().parse_args(["prune", "MODEL", "-o", "OUT", *flags])).model_dump()
    config = barber_config(arguments).model_dump()
    for settings in (meant, config):
        settings["producer_args"] = {key: str(value) for key, value in settings["producer_args"].items()}
        del settings["device"]
    assert config == meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsty": 0.5}, "unknown model argument 'sparsty': did you mean 'sparsity'"),
        ({"revision": "main", "sparsity": 0.5}, "unknown model argument 'revision'"),
        ({"sparse_model": "x", "sparsity": 0.5}, "unknown model argument 'sparse_model'"),
        ({"producer": "wandda"}, "unknown producer 'wandda'"),
        ({"sparsity": "half"}, "sparsity 'half' is not legal"),
        ({"sparsity": 0.5, "granularity": "blok"}, "unknown granularity 'blok'"),
        ({"sparsity": 0.5, "producer_args": "x"}, "producer_args 'x' is not legal"),
        ({"recipe": "x.yaml", "sparsity": 0.5}, "leave out pretrained, sparsity"),
        ({}, "sparsity is missing"),
    ],
)
def test_bad_model_arguments_are_one_line(model_dir, cache, settings, message):
    with pytest.raises(BarberError) as caught:
        checkpoint_for(model_dir, settings, "cpu", ["dtype"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*.safetensors"))


def test_the_cache_knows_all_that_decides_the_masks(model_dir, tmp_path, text_file, monkeypatch):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(model_dir, model)
    shutil.copy(text_file, text)
    settings = {"sparsity": 0.5, "rebuild": "none", "calibration": str(text), "samples": 2, "sequence_length": 16}

    def done(**changes):
        return checkpoint_for(model, {**settings, **changes}, "cpu", ())

    first = done()
    with monkeypatch.context() as patch:
        patch.setattr(lm_eval_checkpoint, "BarberSparsifier", lm_eval_checkpoint.BarberSparsifier)
        patch.setattr(lm_eval_checkpoint.BarberSparsifier, "sparsify", lambda *_, **__: pytest.fail("pruned again"))
        assert done() == first
    assert read_record(first).base_model["name"] == str(model)
    keys = {first, done(sparsity=0.6), done(seed=1), done(producer="magnitude")}
    text.write_text(text.read_text() + "more")
    keys.add(done())
    os.utime(model / "model.safetensors", (1, 1))
    keys.add(done())
    assert len(keys) == 6
    assert all(read_record(key).modules for key in keys)


def test_a_run_prunes_and_its_results_say_how(harness, model_dir, tasks, cache):
    written = harness("barber", "sparsity=0.5,calibration=pydoc,samples=4,sequence_length=16,device=cpu", tasks)
    (checkpoint,) = (path for path in cache.iterdir() if path.is_dir())
    record, told = read_record(checkpoint), written["config"]["sparsity"]
    assert told["mask_fingerprint"] == record.fingerprint
    assert (told["pattern"], told["sparsity"], told["base_model"]) == ("unstructured", record.sparsity, str(model_dir))
    assert (told["producer"]["name"], told["rebuild"]["method"]) == ("wanda", "barber+swaps")
    assert written["configs"]["questions"]["metadata"]["source"] == tasks[0].removeprefix("choice:")
    plain = harness("hf", f"pretrained={checkpoint}", tasks)  # the later of two `pretrained` counts
    finished = harness("barber", f"pretrained={checkpoint}", tasks)
    assert plain["results"] == finished["results"] == written["results"]
    assert finished["config"]["sparsity"] == told
    assert "sparsity" not in plain["config"]
    result = evaluate_tasks(checkpoint, tasks, batch_size=2)
    assert result["sparsity"] == told
    for task, metrics in result["results"].items():
        for name in set(metrics) - {"rows"}:
            assert metrics[name] == pytest.approx(written["results"][task][f"{name},none"], rel=1e-4)


def test_masks_alone_are_laid_over_the_dense_weights(harness, model_dir, tasks, tmp_path, cache, capsys):
    written = harness("barber", MAGNITUDE, tasks[1:])
    (checkpoint,) = (path for path in cache.iterdir() if path.is_dir())
    masks = tmp_path / "masks.safetensors"
    shutil.copy(checkpoint / "sparsity_masks.safetensors", masks)
    laid = harness("barber", f"masks={masks}", tasks[1:])
    assert laid["results"] == written["results"]
    assert laid["config"]["sparsity"]["mask_fingerprint"] == written["config"]["sparsity"]["mask_fingerprint"]
    assert laid["config"]["sparsity"]["producer"]["name"] == "masks"
    tensors = load_file(masks)
    tensors["model.layers.0.mlp.up_proj"] ^= 1
    with safe_open(masks, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, masks, metadata)
    capsys.readouterr()
    harness("barber", f"masks={masks}", tasks[1:], status=2)
    assert "the hash of model.layers.0.mlp.up_proj does not match its mask" in capsys.readouterr().err


def test_the_last_model_of_a_recipe(model_dir, monkeypatch):
    asked = []
    recipe = SimpleNamespace(run_recipe=lambda name: asked.append(name) or SimpleNamespace(model=str(model_dir)))
    monkeypatch.setitem(sys.modules, "optimum_barber.runs.recipe", recipe)
    assert checkpoint_for(None, {"recipe": "r.yaml"}, None, ()) == model_dir
    assert asked == ["r.yaml"]


def test_help_is_that_of_lm_eval_and_names_the_additions(harness, capsys):
    for command in (["run", "--help"], ["ls", "-h"]):
        with pytest.raises(SystemExit) as ended:
            main(["lm-eval", *command])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert "usage: lm-eval" in printed
        assert "recipe=FILE" in printed
    with pytest.raises(SystemExit):
        main(["lm-eval", "--help"])
    assert "choice:FILE.jsonl" in capsys.readouterr().out


def test_other_subcommands_pass_through(harness, capsys):
    before = list(sys.argv)
    assert main(["lm-eval", "ls", "tasks"]) == 0
    assert "|Group|" in capsys.readouterr().out
    assert sys.argv == before


@pytest.mark.parametrize(
    ("arguments", "tasks", "message"),
    [
        ("sparsty=0.5", ["rolling:TEXT"], "unknown model argument 'sparsty'"),
        ("sparsity=0.5,dtype=float33", ["rolling:TEXT"], "unknown dtype 'float33'"),
        (MAGNITUDE, ["rolling:/none"], "there is no file '/none'"),
        (MAGNITUDE, ["no_such_task"], "lm-eval: Tasks not found: no_such_task"),
    ],
)
def test_bad_command_lines_are_one_line(harness, text_file, cache, capsys, arguments, tasks, message):
    harness("barber", arguments, [task.replace("TEXT", str(text_file)) for task in tasks], status=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("optimum-barber: ")
    assert message in error
    assert not list(cache.glob("*"))


def test_two_devices_share_the_requests(harness, model_dir, tmp_path, cache, capfd):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join([json.dumps(ROW)] * 3))
    tasks, output = [f"choice:{questions}"], tmp_path / "several"
    model = ["lm-eval", "run", "--model_args", f"pretrained={model_dir},{MAGNITUDE}", "--tasks", *tasks]
    several = ["--device", "cpu,cpu", "--output_path", str(output)]
    assert main([*model, "--model", "barber", *several]) == 0
    assert capfd.readouterr().out.count("|questions|") == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    (path,) = output.rglob("results*.json")
    two, one = json.loads(path.read_text()), harness("barber", MAGNITUDE, tasks)
    assert two["results"] == one["results"] and two["n-samples"]["questions"]["effective"] == 3
    assert two["config"]["sparsity"] == one["config"]["sparsity"]
    assert main([*model, "--model", "hf", *several]) == 2
    assert "lm-eval works on one device, 'cpu,cpu' are 2: give cpu" in capfd.readouterr().err


RECIPE = """\
model: {model}
calibration: {{texts: [pydoc], samples: 4, sequence_length: 16}}
stages:
  - prune: {{sparsity: 0.5, rebuild: swaps}}
output: {output}
"""


def test_the_first_of_several_ranks_runs_the_recipe(tmp_path, model_dir):
    recipe, notes = tmp_path / "recipe.yaml", tmp_path / "notes"
    recipe.write_text(RECIPE.format(model=model_dir, output=tmp_path / "out"), encoding="utf-8")
    notes.mkdir()
    assert ranks.start(2, ranks.evaluate_recipe, notes, recipe) == [0, 0]
    fingerprint = read_record(read_json(tmp_path / "out" / "run.json")["model"]).fingerprint
    assert ranks.notes(notes) == [[0, 2, fingerprint], [1, 2, fingerprint]]


def test_a_rank_answers_its_requests_alone(monkeypatch):
    lm, counts = object.__new__(BarberLM), []
    lm._world_size = 2
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(HFLM, name, lambda self, requests: counts.append(self.world_size) or [])
        assert getattr(lm, name)([]) == []
    assert counts == [1, 1, 1] and lm.world_size == 2


def test_what_ranks_cannot_share_is_refused_in_one_line(monkeypatch, model_dir):
    for name, value in environment_of(rank=0, count=2, port=1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BarberError, match="call torch.distributed.init_process_group first"):
        BarberLM(str(model_dir), sparsity=0.5)
    monkeypatch.setattr(lm_eval_model, "several_ranks", lambda: True)
    with pytest.raises(BarberError, match="tp_plan splits one model among processes"):
        BarberLM(str(model_dir), tp_plan="auto")
    with pytest.raises(BarberError, match="model argument device cpu is one for all processes: give --device"):
        BarberLM.create_from_arg_obj({"pretrained": str(model_dir), "device": "cpu"})


@pytest.mark.parametrize(
    ("arguments", "device", "shared"),
    [
        ([], None, False),
        (["-M", "barber"], None, True),
        (["--model=barber", "--device", "cuda:1"], "cuda:1", True),
        (["--config", "FILE"], "all", True),
        (["--config", "FILE", "--model", "hf", "--device", "cpu"], "cpu", False),
        (["--config", "nowhere.yaml"], None, False),
        (["--model"], None, False),
    ],
)
def test_what_the_command_reads_of_lm_evals_arguments(tmp_path, arguments, device, shared):
    (tmp_path / "FILE").write_text("model: barber\ndevice: all\n", encoding="utf-8")
    arguments = [str(tmp_path / "FILE") if argument == "FILE" else argument for argument in arguments]
    args = build_parser().parse_args(["lm-eval", "run", *arguments])
    assert (args.device, args.shared, args.arguments) == (device, shared, arguments)


def test_accelerate_forgets_that_it_saw_a_single_process(monkeypatch, model_dir):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    lm = SparseLM(model_dir, device="cpu")
    assert lm.world_size == 1 and not is_initialized() and os.environ["WORLD_SIZE"] == "2"


def test_a_task_with_fewer_rows_than_processes_is_refused_in_one_line(monkeypatch, text_file):
    def build_all_requests(self, **_):
        raise ValueError("task.build_requests() did not find any docs!")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", partial(build_all_requests, None))
    command = ["run", "--model", "barber", "--tasks", f"rolling:{text_file}"]
    with pytest.raises(ValueError, match="did not find any docs"):
        run_harness(command)
    monkeypatch.setattr(lm_eval_run, "several_ranks", lambda: True)
    with pytest.raises(BarberError, match="lm-eval: a task has fewer rows than there are processes"):
        run_harness(command)


def test_from_python_one_import_is_enough(model_dir, tasks, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import optimum_barber.integrations.lm_eval.model  # noqa: F401 - registers `barber`
    from optimum_barber.runs.tasks.offline import offline_tasks

    arguments = {"pretrained": str(model_dir), "producer": "magnitude", "sparsity": 0.5, "rebuild": "none"}
    results = simple_evaluate(
        model="barber", model_args=arguments, tasks=offline_tasks(tasks, tmp_path), log_samples=False,
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert results["config"]["sparsity"]["sparsity"] == 0.5
    assert len(results["results"]) == len(tasks)
