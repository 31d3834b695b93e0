"""What `effort` stands for: the same masks and record as the settings that it names."""

import json

import pytest
import torch

from optimum_barber.cli import build_parser, main
from optimum_barber.cli.prune import config_from
from optimum_barber.integrations.lm_eval.arguments import barber_config
from optimum_barber.models.loading import resolve_model
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.runs.compare.plan import split
from optimum_barber.runs.compare.settings import CompareSettings
from optimum_barber.runs.fingerprint import of_pruned
from optimum_barber.runs.recipe.validation import read_recipe

QUICK = ["--calibration", "pydoc", "--samples", "4", "--sequence-length", "16", "--quiet", "--stream", "never"]
CHAIN = "barber+swaps+gauss-newton"


def named(shares=True, **settings):
    """The rebuild and the allocation that settings come to."""
    config = BarberConfig(**{"sparsity": 0.5, **settings})
    settled = config.under(config.sparsity_pattern(), shares)
    assert BarberConfig.model_validate(json.loads(settled.model_dump_json())) == settled
    again = BarberConfig.model_validate(json.loads(config.model_dump_json()))
    assert again.under(config.sparsity_pattern(), shares) == settled
    return settled.rebuild.method, settled.allocation, settled.allocation_args


@pytest.mark.parametrize(
    ("effort", "unstructured", "grouped"),
    [
        ("fast", ("swaps", "uniform", {}), ("swaps", "uniform", {})),
        ("default", ("barber+swaps", "uniform", {}), ("swaps+gauss-newton", "uniform", {})),
        ("best", (CHAIN, "measured", {"spread": 0.15}), ("swaps+gauss-newton", "uniform", {})),
    ],
)
def test_what_an_effort_stands_for(effort, unstructured, grouped):
    assert named(effort=effort) == unstructured
    assert named(effort=effort, pattern="2:4") == grouped


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rebuild": "dsnot"}, ("dsnot", "measured", {"spread": 0.15})),
        ({"rebuild": {"swaps": 5}}, (CHAIN, "measured", {"spread": 0.15})),
        ({"rebuild": {"rebuild_ratio": 0.1}}, (CHAIN, "measured", {"spread": 0.15})),
        ({"allocation": "uniform"}, (CHAIN, "uniform", {})),
        ({"allocation": "owl"}, (CHAIN, "owl", {})),
        ({"allocation_args": {"spread": 0.05}}, (CHAIN, "measured", {"spread": 0.05})),
        ({"allocation_args": {"samples": 4}}, (CHAIN, "measured", {"spread": 0.15, "samples": 4})),
        ({"pattern": "2:4", "rebuild": {"rebuild_ratio": 0.1}}, (CHAIN, "uniform", {})),
        ({"shares": False}, (CHAIN, "uniform", {})),
    ],
)
def test_what_is_given_goes_first(settings, expected):
    assert named(effort="best", **settings) == expected


def test_a_setting_of_barber_keeps_barber_at_any_effort():
    assert named(effort="fast", rebuild={"rounds": 2})[0] == "barber+swaps"


def test_an_unknown_effort_names_the_legal_ones(model_dir, tmp_path, capsys):
    command = ["prune", str(model_dir), "--sparsity", "0.5", *QUICK, "-o", str(tmp_path / "out")]
    assert main([*command, "--effort", "bset"]) == 2
    error = capsys.readouterr().err
    assert "unknown effort 'bset': did you mean 'best'" in error
    assert error.count("\n") == 1
    assert all(name in error for name in ("fast", "default", "best"))


@pytest.mark.parametrize(
    ("effort", "flags", "spelled"),
    [
        ("best", ["--sparsity", "0.5"],
         ["--rebuild", CHAIN, "--allocation", "measured", "--allocation-arg", "spread=0.15"]),
        ("best", ["--pattern", "2:4"], []),
        ("fast", ["--sparsity", "0.5"], ["--rebuild", "swaps"]),
    ],
)  # fmt: skip
def test_the_same_masks_and_record_as_the_named_settings(model_dir, tmp_path, effort, flags, spelled):
    command = ["prune", str(model_dir), *flags, *QUICK, "-o"]
    assert main([*command, str(tmp_path / "effort"), "--effort", effort]) == 0
    assert main([*command, str(tmp_path / "spelled"), *spelled]) == 0
    for name in ("sparsity_config.json", "sparsity_masks.safetensors", "model.safetensors"):
        assert (tmp_path / "effort" / name).read_bytes() == (tmp_path / "spelled" / name).read_bytes()
    configs = [json.loads((tmp_path / run / "barber_config.json").read_text()) for run in ("effort", "spelled")]
    for config in configs:
        config["allocation_args"] = {name: float(value) for name, value in config["allocation_args"].items()}
    assert configs[0] == configs[1]


def test_masks_that_are_there_are_shared_out_already(model_dir, tmp_path):
    first = tmp_path / "first"
    command = ["prune", str(model_dir), *QUICK]
    assert main([*command, "--sparsity", "0.5", "--rebuild", "none", "-o", str(first)]) == 0
    for producer in (
        ["--producer", "existing", "--sparse-model", str(first)],
        ["--producer", "masks", "--masks", str(first / "sparsity_masks.safetensors")],
    ):
        output = tmp_path / producer[1]
        assert main([*command, *producer, "--effort", "best", "-o", str(output)]) == 0
        record = json.loads((output / "sparsity_config.json").read_text())
        assert record["rebuild"]["method"] == CHAIN
        assert record["allocation"] is None


def test_all_entrances_take_an_effort(model_dir, tmp_path):
    expected = BarberConfig(sparsity=0.5, effort="best")
    args = build_parser().parse_args(["prune", "M", "--sparsity", "0.5", "--effort", "best", "-o", "OUT"])
    assert config_from(args) == expected
    told = barber_config({"sparsity": 0.5, "effort": "best"}, "cpu")
    assert told == expected.model_copy(update={"device": "cpu"})
    assert of_pruned(resolve_model(str(model_dir)), told, torch.device("cpu"))
    settings, base = split({"evaluation": "pydoc", "effort": "best"})
    assert (settings, base.effort, base.allocation) == (CompareSettings(evaluation="pydoc"), "best", "auto")
    for stage, method, allocation in (
        ({"effort": "best"}, CHAIN, "measured"),
        ({"effort": "best", "rebuild": "none", "allocation": "uniform"}, "none", "uniform"),
        ({}, "none", "uniform"),
    ):
        content = {"model": str(model_dir), "output": "OUT", "stages": [{"prune": {"sparsity": 0.5, **stage}}]}
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        recipe = read_recipe(tmp_path / "recipe.yaml")
        config = recipe.stages[0].config(recipe)
        settled = config.under(config.sparsity_pattern())
        assert (settled.rebuild.method, settled.allocation) == (method, allocation)


def test_arguments_of_an_allocation_that_the_pattern_leaves_out_are_refused(model_dir, tmp_path, capsys):
    command = ["prune", str(model_dir), "--pattern", "2:4", *QUICK, "-o", str(tmp_path / "out")]
    assert main([*command, "--effort", "best", "--allocation-arg", "spread=0.1"]) == 2
    assert "allocation 'uniform' takes no argument 'spread'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
