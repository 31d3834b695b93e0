"""`--model barber` with the settings of `shrink`: what they mean, the cache, the results."""

import json

import pytest

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.structure import read_structure
from optimum_barber.cli import build_parser
from optimum_barber.cli.shrink import config_from
from optimum_barber.integrations.lm_eval import checkpoint as lm_eval_checkpoint
from optimum_barber.integrations.lm_eval.arguments import shrink_config
from optimum_barber.integrations.lm_eval.checkpoint import checkpoint_for
from optimum_barber.runs.tasks.evaluate import evaluate_tasks

from .test_lm_eval import cache, harness, tasks  # noqa: F401 - fixtures

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

QUICK = {"calibration": "pydoc", "samples": 2, "sequence_length": 16}


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ({"remove": 0.2}, ["--remove", "0.2"]),
        (
            {"scorer": "bip", "remove": 0.2, "norm_gain": "true", "calibration": "[pydoc,'a.txt']"},
            ["--remove", "0.2", "--scorer-arg", "norm_gain=true", "--calibration", "pydoc", "--calibration", "a.txt"],
        ),
        (
            {"scorer": "wanda", "remove_heads": 0, "remove_channels": 0.3, "round_to": 8, "seed": 3, "samples": 4},
            ["--scorer", "wanda", "--remove-heads", "0", "--remove-channels", "0.3", "--round-to", "8", "--seed", "3",
             "--samples", "4"],
        ),
        ({"structure": "DIR"}, ["--structure", "DIR"]),
    ],
)  # fmt: skip
def test_model_arguments_mean_what_the_flags_mean(arguments, flags):
    meant = config_from(build_parser().parse_args(["shrink", "MODEL", "-o", "OUT", *flags])).model_dump()
    result = shrink_config(arguments).model_dump()
    assert {**result, "device": "auto"} == meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "bipp", "remove": 0.2}, "unknown scorer 'bipp': did you mean 'bip'"),
        ({"remove": 2}, "remove 2 is not legal"),
        ({"scorer": "bip"}, "remove is missing"),
        ({"remove": 0.2, "sparsity": 0.5}, "unknown model argument 'sparsity'"),
        ({"remove": 0.2, "roundto": 8}, "did you mean 'round_to'"),
        ({"remove": 0.2, "scorer": "wanda", "norm_gain": True}, "unknown model argument 'norm_gain'"),
        ({"remove": 0.2, "scorer_args": "x"}, "unknown model argument 'scorer_args'"),
    ],
)
def test_bad_model_arguments_are_one_line(model_dir, cache, settings, message):  # noqa: F811
    with pytest.raises(BarberError) as caught:
        checkpoint_for(model_dir, settings, "cpu", ["dtype"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*"))


def test_the_cache_knows_all_that_decides_the_cut(model_dir, tmp_path, monkeypatch):
    def done(**changes):
        return checkpoint_for(model_dir, {**QUICK, "remove": 0.3, **changes}, "cpu", ())

    first = done()
    with monkeypatch.context() as patch:
        patch.setattr(lm_eval_checkpoint.BarberShrinker, "shrink", lambda *_, **__: pytest.fail("cut again"))
        assert done() == first
    keys = {first, done(remove=0.4), done(scorer="magnitude"), done(norm_gain=True), done(seed=1)}
    assert len(keys) == 5
    again = checkpoint_for(model_dir, {"structure": str(first)}, "cpu", ())
    assert read_structure(again).fingerprint == read_structure(first).fingerprint
    assert checkpoint_for(first, {}, "cpu", ()) == first


def test_a_run_shrinks_and_its_results_say_how(harness, model_dir, tasks, cache):  # noqa: F811
    written = harness("barber", "scorer=bip,remove=0.3,calibration=pydoc,samples=2,sequence_length=16", tasks)
    (checkpoint,) = (path for path in cache.iterdir() if path.is_dir())
    record, told = read_structure(checkpoint), written["config"]["structure"]
    assert told == {
        "base_model": str(model_dir), "scorer": {"name": "bip", "arguments": {}}, "removed": record.removed,
        "head_unit": "key-value group", "heads": {"before": 2, "after": 1}, "channels": {"before": 48, "after": 40},
        "structure_fingerprint": record.fingerprint,
    }  # fmt: skip
    assert written["config"]["sparsity"] is None
    plain = harness("hf", f"pretrained={checkpoint}", tasks)  # the later of two `pretrained` counts
    assert plain["results"] == written["results"]
    result = evaluate_tasks(checkpoint, tasks)
    assert (result["structure"], result["sparsity"]) == (told, None)
    assert json.loads((checkpoint / "report.json").read_text())["after"].keys() == {
        "parameters", "weight_bytes", "macs_per_token",
    }  # fmt: skip
