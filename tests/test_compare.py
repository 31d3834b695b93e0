"""`optimum-barber compare`: every cell on equal terms, each done once, nothing lost, no fault found late."""

import csv
import json
import shutil

import pytest

from optimum_barber import BarberConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.cli import main
from optimum_barber.runs.compare import compare
from optimum_barber.runs.compare.benchmark import MaskBenchmark
from optimum_barber.runs.compare.cells import CompareError, cells_of
from optimum_barber.runs.compare.settings import CompareSettings
from optimum_barber.runs.report.html import html
from optimum_barber.runs.report.page import charts_in
from optimum_barber.runs.report.write import page_of

from . import browser

CALIBRATION = {"texts": ["pydoc"], "samples": 4, "sequence_length": 16}
SHARED = {"calibration": CALIBRATION, "evaluation": "pydoc", "windows": 4}
AXES = {"producers": ["magnitude", "wanda"], "rebuilds": ["none", "barber,rounds=1"], "sparsities": [0.5]}
FLAGS = [
    "--calibration",
    "pydoc",
    "--samples",
    "4",
    "--sequence-length",
    "16",
    "--evaluation",
    "pydoc",
    "--windows",
    "4",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory, model_dir):
    """A comparison of six cells, its masks kept."""
    output = tmp_path_factory.mktemp("compare") / "out"
    return compare(
        str(model_dir), output, quiet=True, keep_masks=True, patterns=["unstructured", "2:4"], **AXES | SHARED
    )


def table(output):
    """The rows of compare.csv."""
    return list(csv.DictReader((output / "compare.csv").read_text(encoding="utf-8").splitlines()))


def cells(**axes):
    return cells_of(CompareSettings(evaluation="pydoc", **axes), BarberConfig(calibration={"samples": 4}))


def test_every_combination_is_a_cell_and_equal_runs_are_one():
    result = cells(**AXES, patterns=["unstructured", "2:4"], vary={"rounds": [1, 2], "samples": [4, 8]})
    # a rebuild's own rounds outdo the axis, and `none` has no rounds: of 2 x 2 x 2 x 2 x 2 the half are the same runs
    assert len(result) == 16 == len({cell.name for cell in result})
    assert {cell.labels["sparsity"] for cell in result} == {0.5}
    assert {cell.labels["rounds"] for cell in result if cell.labels["rebuild"] == "none"} == {None}
    assert [cell.config.calibration.samples for cell in result] == [cell.labels["samples"] for cell in result]


def test_auto_is_the_rebuild_that_it_means():
    result = cells(
        producers=["wanda"], rebuilds=["auto", "swaps+gauss-newton"], patterns=["unstructured", "2:4"], sparsities=[0.5]
    )
    assert [cell.name for cell in result] == ["wanda_auto_0.5", "wanda_swaps+gauss-newton_0.5", "wanda_auto_2-4"]


def test_a_label_stands_for_settings_and_arguments():
    result = cells(producers=["sparsegpt,update=false,as=mask only"], rebuilds=["barber+barber,rounds=3,as=long"],
                  sparsities=[0.5], rebuild_args={"granularity": "layer", "rounds": 1})  # fmt: skip
    assert result[0].name == "mask-only_long_0.5"
    assert result[0].config.producer_args == {"update": "false"}
    assert (result[0].config.rebuild.rounds, result[0].config.rebuild.granularity) == (3, "layer")
    assert result[0].config.rebuild.chain == ["barber", "barber"]


def test_a_cell_is_what_prune_and_eval_give(done, model_dir, tmp_path):
    name, measured = "wanda_barber-rounds=1_2-4", tmp_path / "eval.json"
    pruned = tmp_path / "out"
    flags = ["--pattern", "2:4", "--rebuild", "barber", "--rounds", "1", *FLAGS[:6], "--quiet", "-o", str(pruned)]
    assert main(["prune", str(model_dir), *flags]) == 0
    command = ["eval", str(pruned), "--perplexity", "pydoc", "--sequence-length", "16", "--windows", "4", "--quiet"]
    assert main([*command, "--json", str(measured)]) == 0
    dense, sparse = json.loads(measured.read_text())
    assert done.dense["perplexity"]["perplexity"] == dense["perplexity"]
    assert done.cells[name]["perplexity"]["perplexity"] == sparse["perplexity"]
    record = json.loads((pruned / "sparsity_config.json").read_text())
    assert done.cells[name]["record"]["modules"] == record["modules"]
    kept = done.output / "masks" / f"{name}.safetensors"
    assert kept.read_bytes() == (pruned / "sparsity_masks.safetensors").read_bytes()


def test_all_cells_share_one_calibration_set_and_the_dense_weights(done):
    assert len({cell["record"]["calibration"]["fingerprint"] for cell in done.cells.values()}) == 1
    before = {name: cell["report"]["error_before"] for name, cell in done.cells.items()}
    first = done.cells["wanda_none_0.5"]["report"]["blocks"][0]["error_before"]
    assert done.cells["wanda_barber-rounds=1_0.5"]["report"]["blocks"][0]["error_before"] == first
    assert len(before) == 8


def test_tables_and_page_hold_the_same_figures(done):
    rows = table(done.output)
    assert [row["name"] for row in rows] == ["dense", *done.cells]
    text = (done.output / "compare.md").read_text(encoding="utf-8")
    page = (done.output / "report.html").read_text(encoding="utf-8")
    for row, cell in zip(rows[1:], done.cells.values(), strict=True):
        result = cell["perplexity"]["perplexity"]
        assert float(row["perplexity"]) == result
        assert f"{result:.6g}" in text
        assert f'<data value="{result!r}">' in page
        assert int(row["swaps"]) == cell["report"]["swaps"]
    cell = html(page_of(done.output / "cells" / f"{next(iter(done.cells))}.json"))
    assert f'<data value="{done.dense["perplexity"]["perplexity"]!r}">' in cell


def test_a_second_run_does_only_what_is_missing_or_changed(done, model_dir, tmp_path, monkeypatch):
    output = tmp_path / "again"
    shutil.copytree(done.output, output)
    same = AXES | SHARED | {"patterns": ["unstructured", "2:4"], "keep_masks": True}
    opened = []
    monkeypatch.setattr(MaskBenchmark, "__init__", lambda *args: opened.append(args))
    again = compare(str(model_dir), output, quiet=True, **same)
    assert (opened, again.reused, again.cells) == ([], list(done.cells), done.cells)
    monkeypatch.undo()
    (output / "cells" / "magnitude_none_0.5.json").unlink()
    (output / "masks" / "wanda_none_0.5.safetensors").unlink()
    (output / "cells" / "wanda_none_2-4.json").write_text("{ half")
    again = compare(str(model_dir), output, quiet=True, **same)
    missing = {"magnitude_none_0.5", "wanda_none_0.5", "wanda_none_2-4"}
    assert set(done.cells) - set(again.reused) == missing
    for name in missing:
        assert again.cells[name]["perplexity"] == done.cells[name]["perplexity"]
    changed = compare(str(model_dir), output, quiet=True, **same | {"windows": 3})
    assert changed.reused == []


def test_a_killed_run_goes_on(done, model_dir, tmp_path, monkeypatch):
    output, own = tmp_path / "killed", MaskBenchmark.run

    def killed(self, cell, masks=None):
        if cell.config.producer == "wanda":
            raise KeyboardInterrupt
        return own(self, cell, masks)

    monkeypatch.setattr(MaskBenchmark, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(str(model_dir), output, quiet=True, **AXES | SHARED)
    assert "2 of 4 runs" in html(page_of(output))
    monkeypatch.undo()
    again = compare(str(model_dir), output, quiet=True, **AXES | SHARED)
    assert again.reused == ["magnitude_none_0.5", "magnitude_barber-rounds=1_0.5"]
    assert again.cells["wanda_none_0.5"]["perplexity"] == done.cells["wanda_none_0.5"]["perplexity"]
    assert not list(output.rglob("*.partial"))


def test_a_cell_that_fails_is_told_and_tried_again(model_dir, tmp_path, monkeypatch, capsys):
    own = MaskBenchmark.run

    def failing(self, cell, masks=None):
        if cell.config.producer == "magnitude":
            raise BarberError("no luck")
        return own(self, cell, masks)

    monkeypatch.setattr(MaskBenchmark, "run", failing)
    command = ["compare", str(model_dir), "--producers", "magnitude", "wanda", "--rebuilds", "none", "--sparsities",
               "0.5", *FLAGS, "-o", str(tmp_path / "out")]  # fmt: skip
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == ["to", "do", "dense", "to", "do", "magnitude_none_0.5", "to", "do",
                                               "wanda_none_0.5"]  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "magnitude_none_0.5 failed: no luck" in printed.err
    assert "| wanda | none |" in printed.out
    assert "no luck" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    monkeypatch.undo()
    assert main([*command, "--quiet"]) == 0


def test_all_faults_are_found_before_any_work(model_dir, tmp_path):
    with pytest.raises(CompareError) as caught:
        cells(producers=["wnda", "wanda,power=2"], rebuilds=["barbr", "barber,rounds=0", "barber,speed=1"],
              patterns=["4:2", "unstructured"])  # fmt: skip
    lines = str(caught.value).splitlines()
    for part in ("'wnda'", "'power'", "'barbr'", "rounds", "'speed'", "'4:2'", "sparsities are missing"):
        assert any(part in line for line in lines), part
    with pytest.raises(CompareError, match=r"3:7 does not fit") as caught:
        compare(str(model_dir), tmp_path / "out", quiet=True, producers=["wanda"], patterns=["3:7", "1:5"], **SHARED)
    assert "1:5 does not fit" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluation", "nothing.txt"], "text 'nothing.txt' is neither"),
        (["--vary", "producer=a,b"], "unknown setting to vary 'producer'"),
        (["--vary", "rounds"], "SETTING"),
        (["--rebuild-arg", "speed=1"], "unknown setting of a rebuild 'speed'"),
        (["--windows", "0"], "windows 0 is not legal"),
        (["--sequence-length", "4096"], "more than the model's 64 positions"),
        (["--tasks", "choice:nothing.jsonl"], "there is no file"),
        (["-o", "{model}"], "is the input"),
        (["-o", "{full}"], "is not empty"),
    ],
)
def test_bad_input_is_told_and_writes_nothing(model_dir, tmp_path, capsys, flags, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    flags = [flag.format(model=model_dir, full=tmp_path / "full") for flag in flags]
    assert main(["compare", str(model_dir), "--sparsities", "0.5", *FLAGS, "-o", str(tmp_path / "out"), *flags]) == 2
    assert message.replace("SETTING", "KEY=VALUE") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_tasks_are_measured_for_every_cell(model_dir, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"Number {n} is", "choices": ["odd", "even"], "gold": n % 2} for n in range(4)]
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = [f"choice:{tmp_path / name}.jsonl" for name in ("first", "second")]
    done = compare(str(model_dir), tmp_path / "out", quiet=True, tasks=tasks, producers=["wanda"], rebuilds=["none"],
                   sparsities=[0.5], **SHARED)  # fmt: skip
    result = done.cells["wanda_none_0.5"]["tasks"]
    assert set(result) == {"first", "second"} and result["first"]["rows"] == 4
    row = table(done.output)[1]
    assert float(row["first.acc"]) == result["first"]["acc"]
    assert "mean accuracy" in (done.output / "compare.md").read_text(encoding="utf-8")
    page = (done.output / "report.html").read_text(encoding="utf-8")
    assert f'<data value="{result["first"]["acc_stderr"]!r}">' in page


def test_chains_and_reconstructions_are_passed_on(model_dir, tmp_path):
    done = compare(str(model_dir), tmp_path / "out", quiet=True, producers=["wanda"], rebuilds=["none", "barber+swaps"],
                   patterns=["2:4"], vary={"reconstruct": ["none", "least-squares"]}, **SHARED)  # fmt: skip
    assert len(done.cells) == 4
    name = "wanda_barber+swaps_2-4_reconstruct=least-squares"
    assert done.cells[name]["config"]["reconstruct"]["method"] == "least-squares"
    page = html(page_of(done.output))
    assert "Block error at 2:4, relative" in page and "Block error at 2:4, absolute" in page
    cell = html(page_of(done.output / "cells" / f"{name}.json"))
    assert "attention, rebuilt" in cell and "Pair values, " in cell


def test_a_numeric_axis_becomes_a_chart(model_dir, tmp_path):
    done = compare(str(model_dir), tmp_path / "out", quiet=True, producers=["wanda"], rebuilds=["none", "barber"],
                   sparsities=[0.4, 0.6], rebuild_args={"rounds": 1}, vary={"rebuild_ratio": [0.01, 0.1]},
                   **SHARED)  # fmt: skip
    titles = [chart.title for chart in charts_in(page_of(done.output).sections)]
    assert "Perplexity over sparsity" in titles and "Perplexity over ratio α" in titles


def test_a_recipe_compares(model_dir, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""\
name: compared
model: {model_dir}
calibration: {{texts: [pydoc], samples: 4, sequence_length: 16}}
stages:
  - compare: {{producers: [wanda], rebuilds: [none], patterns: ["2:4"], evaluation: pydoc, windows: 2}}
  - report
output: {tmp_path / "out"}
""")
    assert main(["run", str(recipe), "--quiet"]) == 0
    assert (tmp_path / "out" / "01-compare" / "compare.csv").is_file()
    assert "wanda" in (tmp_path / "out" / "02-report" / "report.html").read_text(encoding="utf-8")
    assert "Perplexity at 2:4" in html(page_of(tmp_path / "out"))
    recipe.write_text(recipe.read_text().replace("wanda", "wnda"))
    assert main(["run", str(recipe), "--quiet"]) == 2


@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_browser_shows_the_page_on_a_phone(done, tmp_path):
    result, console = browser.probe(html(page_of(done.output)), tmp_path, 360)
    assert (console, result["wide"], result["scroll"]) == ([], [], 360)


def test_a_directory_of_version_0_1_is_reported_and_done_again(model_dir, tmp_path):
    """Version 0.1.0 kept the fields of the calibration beside it, and had no `effort`."""
    output, name, calibration = tmp_path / "out", "wanda_none_0.5", {"source": "pydoc", "fingerprint": "b922"}
    shared = {"calibration": ["pydoc"], "text_field": "text", "samples": 4, "sequence_length": 16, "seed": 0,
              "allocation": "uniform", "allocation_args": {}, "reconstruct": {"method": "none", "iterations": 15},
              "device": "auto", "dtype": "auto", "precision": "highest", "batch_size": None, "ignore": []}  # fmt: skip
    own = {"producer": "wanda", "producer_args": {}, "sparsity": 0.5, "pattern": "unstructured",
           "rebuild": {"method": "none", "granularity": "auto", "error": "absolute"}}  # fmt: skip
    measured = {"perplexity": 95.5, "text": "pydoc", "split": "evaluation", "windows": 4, "available": 40,
                "sequence_length": 16, "dtype": "float32"}  # fmt: skip
    totals = {"error_before": 0.5, "error_after": 0.5, "pairs": 0, "swaps": 0, "rows": 96, "rows_without_swap": 96}
    block = {"block": "model.layers.0.attention", "error_rebuilt": 0.5, "rounds": [], "reconstructions": [], **totals,
             "forward_passes": 1.0, "gradient_passes": 0.0, "seconds": 0.1, "peak_memory": 1000000}  # fmt: skip
    cell = {"name": name, "fingerprint": "10d0", "config": {**own, **shared}, "seconds": 0.1, "peak_memory": 1000000,
            "labels": {"producer": "wanda", "rebuild": "none", "pattern": "unstructured", "sparsity": 0.5},
            "record": {"modules": {}, "calibration": calibration}, "perplexity": measured, "dense": measured,
            "report": {"sparsity": 0.5, "blocks": [block], "allocation": None, **totals}}  # fmt: skip
    axes = {"producers": ["wanda"], "rebuilds": ["none"], "sparsities": [0.5], "evaluation": "pydoc", "windows": 4}
    content = {"format_version": 1, "status": "finished", "model": str(model_dir), "settings": axes, "base": shared,
               "cells": [name], "fingerprints": {"dense": "ef01", name: "10d0"},
               "software": {"optimum-barber": "0.1.0"}}  # fmt: skip
    dense = {"name": "dense", "fingerprint": "ef01", "perplexity": measured}
    (output / "cells").mkdir(parents=True)
    for path, record in (("compare.json", content), ("dense.json", dense), (f"cells/{name}.json", cell)):
        (output / path).write_text(json.dumps(record), encoding="utf-8")
    assert main(["report", str(output), "-o", str(tmp_path / "report")]) == 0
    assert '<data value="95.5">' in html(page_of(output))
    again = compare(str(model_dir), output, quiet=True, **axes, calibration=CALIBRATION)
    assert again.reused == []
    assert again.cells[name]["config"]["calibration"]["samples"] == 4
    assert again.cells[name]["perplexity"]["perplexity"] != 95.5
