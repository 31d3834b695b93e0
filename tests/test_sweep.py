"""Sweeps: cells equal to single runs, resumed cell by cell, tables and pictures, bad input."""

import csv
import json
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from optimum_barber import BarberShrinker, ShrinkConfig, SweepConfig, perplexity, run_sweep
from optimum_barber.base.errors import BarberError
from optimum_barber.cli import main
from optimum_barber.models.source import ModelSource
from optimum_barber.runs.sweep import benchmark
from optimum_barber.shrink import scan as scoring
from optimum_barber.shrink.cut_errors import block_errors
from optimum_barber.shrink.plan import plan_cut
from optimum_barber.shrink.scan import choose_units
from optimum_barber.shrink.scorers import SCORERS
from optimum_barber.text.sources import read_texts
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import consecutive_windows

from .conftest import tiny_model, tiny_windows

SETTINGS = {
    "scorers": ["bip", "magnitude"], "remove": [0.3, 0.5], "samples": [2, 4],
    "calibration": {"texts": ["pydoc"], "sequence_length": 16}, "evaluation": "pydoc", "windows": 2, "latency": False,
}  # fmt: skip
NAMES = ["dense", *(f"{s}-{r}-{n}" for n in (2, 4) for s in ("bip", "magnitude") for r in (0.3, 0.5))]


@pytest.fixture(scope="module")
def swept(model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "out"
    return run_sweep(model_dir, SweepConfig(**SETTINGS), output, quiet=True)


def test_every_cell_is_what_a_run_of_its_own_gives(swept, model_dir, tokenizer):
    assert list(swept.cells) == NAMES
    text = consecutive_windows(Encoder(tokenizer).tokens(read_texts("pydoc", "evaluation")), 16, 2, "pydoc")
    for name in ("bip-0.5-4", "magnitude-0.3-2"):
        scorer, remove, samples = name.split("-")
        calibration = {"texts": ["pydoc"], "samples": int(samples), "sequence_length": 16}
        config = ShrinkConfig(scorer=scorer, remove=float(remove), calibration=calibration)
        result = BarberShrinker.from_pretrained(model_dir).shrink(config, latency=False, quiet=True)
        cell = swept.cells[name]
        assert cell["structure_fingerprint"] == result.structure.fingerprint
        assert cell["perplexity"] == perplexity(result.model, text, quiet=True).as_dict()
        assert cell["after"] == result.report["after"]
        assert cell["removed"] == result.report["removed"]
        if scorer == "bip":
            assert cell["blocks"] == result.report["blocks"]
            assert cell["layer_errors"] == result.report["layer_errors"]


def test_tables_and_pictures(swept):
    with (swept.output / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["scorer"] for row in rows] == ["dense", *(name.split("-")[0] for name in NAMES[1:])]
    assert float(rows[1]["perplexity"]) == swept.cells["bip-0.3-2"]["perplexity"]["perplexity"]
    lines = (swept.output / "table.md").read_text().splitlines()
    assert "Perplexity on 2 of" in lines[2]
    assert lines[-len(NAMES)].startswith("| dense |  | 0.0000 |  | ")
    assert f"| {swept.cells['bip-0.3-2']['after']['parameters']:,} |" in lines[-len(NAMES) + 1]
    pytest.importorskip("matplotlib")
    assert {path.name for path in swept.output.glob("*.png")} == {
        "perplexity.png", "perplexity-by-samples-0.3.png", "perplexity-by-samples-0.5.png", "errors-0.3.png",
        "errors-0.5.png",
    }  # fmt: skip


def test_a_stopped_sweep_goes_on_and_only_what_changed_is_measured_again(swept, model_dir, tmp_path, monkeypatch):
    def stop(name, *_):
        if name == "bip-0.5-2":
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(model_dir, SweepConfig(**SETTINGS), output, quiet=True, tell=stop)
    assert not (output / "table.md").exists()
    again = run_sweep(model_dir, SweepConfig(**SETTINGS), output, quiet=True)
    assert again.reused == NAMES[:3]
    for file in ("table.csv", "table.md"):
        assert (output / file).read_bytes() == (swept.output / file).read_bytes()
    wider = run_sweep(model_dir, SweepConfig(**{**SETTINGS, "scorers": ["bip", "wanda"]}), output, quiet=True)
    assert wider.reused == [name for name in NAMES if "magnitude" not in name]
    other = run_sweep(model_dir, SweepConfig(**{**SETTINGS, "windows": 3}), output, quiet=True)
    assert other.reused == []
    (output / "cells" / "dense.json").write_text("{")
    monkeypatch.setattr(benchmark, "choose_units", lambda *_: pytest.fail("scored again"))
    assert run_sweep(model_dir, SweepConfig(**{**SETTINGS, "windows": 3}), output, quiet=True).reused == NAMES[1:]
    monkeypatch.setattr(benchmark.CutBenchmark, "__init__", lambda *_: pytest.fail("loaded again"))
    assert run_sweep(model_dir, SweepConfig(**{**SETTINGS, "windows": 3}), output, quiet=True).reused == NAMES


def test_one_pass_serves_all_and_each_shape_is_timed_once(model_dir, tmp_path, monkeypatch):
    counts = Counter()

    def counted(module, name):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (counts.update([name]), made(*a, **k))[1])

    counted(scoring, "choose_by_block")
    counted(benchmark, "latency")
    monkeypatch.setattr("optimum_barber.shrink.figures.latency", benchmark.latency)
    settings = {**SETTINGS, "scorers": ["bip", "wanda", "barber", "taylor"], "samples": [2], "latency": True}
    result = run_sweep(model_dir, SweepConfig(**settings), tmp_path / "out", quiet=True)
    assert counts == {"choose_by_block": 1, "latency": 1 + 2 * 2}  # dense; before and after at two ratios
    assert "Latency, median of 5" in (tmp_path / "out" / "table.md").read_text()
    assert all(cell["after"]["latency"]["prefill"]["median"] > 0 for cell in result.cells.values())


def test_several_plans_choose_what_each_chooses_alone():
    model, windows = tiny_model(), tiny_windows()
    configs = [ShrinkConfig(scorer=name, remove=remove) for remove in (0.3, 0.6) for name in SCORERS]
    cuts = [plan_cut(model, config) for config in configs]
    together = choose_units(ModelSource(model), windows, cuts)
    assert together == [choose_units(ModelSource(model), windows, [cut])[0] for cut in cuts]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt-post-norm"])
@torch.no_grad()
def test_a_blocks_error_is_that_of_its_own_cut(family):
    model, windows = tiny_model(family), tiny_windows(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = ModelSource(model)
    config = ShrinkConfig(remove=0.3, remove_heads=0) if "opt" in family else ShrinkConfig(remove=0.5)
    cut = plan_cut(model, config)
    (kept,) = choose_units(source, windows, [cut])
    actual = {entry["block"]: entry["error"] for entry in block_errors(source, windows, kept, cut.units)}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for layer, stays in kept.items():
        for kind, block in (("heads", "attention"), ("channels", "mlp")):
            unit = cut.units[kind]
            reader = model.get_submodule(f"{layer}.{unit.reader}")
            seen = []
            handle = reader.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
            for window in windows.split(1):
                model(window, use_cache=False)
            handle.remove()
            x = torch.cat([each.flatten(0, -2) for each in seen])
            part = unit.slices[-1]
            gone = [
                part.start + u * part.width + j
                for u in range(unit.count) if u not in stays[kind] for j in range(part.width)
            ]  # fmt: skip
            bias = 0 if reader.bias is None else reader.bias.double()
            y, away = x @ reader.weight.double().t() + bias, x[:, gone] @ reader.weight[:, gone].double().t()
            expected = (away.square().sum() / y.square().sum()).item()
            assert actual[f"{layer}.{block}"] == pytest.approx(expected, rel=1e-4, abs=1e-12)


COMMAND = ["--calibration", "pydoc", "--evaluation", "pydoc", "--sequence-length", "16", "--windows", "2", "--quiet"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--remove", "0.2", "2"], "remove 2 is not legal"),
        (["--remove", "0.2", "--scorers", "bip", "bipp"], "unknown scorer 'bipp': did you mean 'bip'"),
        (["--remove", "0.2", "0.99"], "would take all 2 key-value groups"),
        (["--remove", "0.2", "--samples", "0"], "samples.0 0 is not legal"),
        (["--remove", "0.2", "--windows", "100000"], "windows 100000 is not legal"),
        (["--remove", "0.2", "--evaluation", "/none"], "text '/none' is neither a file nor one of"),
        (["--remove", "0.2", "--sequence-length", "65"], "more than the model's 64 positions"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(flags, message, model_dir, tmp_path, capsys):
    assert main(["sweep", str(model_dir), *COMMAND, *flags, "-o", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_of_others_is_left_alone(model_dir, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(BarberError, match="holds something that is no sweep"):
        run_sweep(model_dir, SweepConfig(**SETTINGS), tmp_path, quiet=True)
    with pytest.raises(ValidationError, match="remove"):
        SweepConfig(evaluation="pydoc", remove=[])


def test_the_command_prints_its_table(swept, model_dir, capsys):
    command = ["sweep", str(model_dir), *COMMAND[:-1], "--scorers", "bip", "magnitude", "--remove", "0.3", "0.5"]
    assert main([*command, "--samples", "2", "4", "--no-latency", "-o", str(swept.output)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dense (as before): perplexity ")
    assert said.endswith((swept.output / "table.md").read_text())
    assert json.loads((swept.output / "sweep.json").read_text())["model"] == str(model_dir)
