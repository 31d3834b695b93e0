"""`--device` with several devices: a rank each, one voice, one exit status, and nothing that outlives the command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from optimum_barber import BarberConfig, SweepConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.base.launcher import environment_of
from optimum_barber.cli import build_parser, main
from optimum_barber.cli.main import _run
from optimum_barber.cli.processes import run_on, status_of
from optimum_barber.models import device
from optimum_barber.models.device import choose_device, device_names
from optimum_barber.models.loading import resolve_model
from optimum_barber.runs import fingerprint
from optimum_barber.runs.cells import CellTable
from optimum_barber.runs.compare import plan
from optimum_barber.runs.compare.settings import CompareSettings
from optimum_barber.runs.sweep import runner
from optimum_barber.runs.tasks.lm import available_device

from . import ranks
from .test_streaming import files

IGNORED = re.compile(
    r"Exception ignored in.*\nTraceback.*\n(?:  .*\n)*.*\n"
)  # an interrupt in a third party's finalizer
QUICK = ["--sparsity", "0.5", "--samples", "4", "--sequence-length", "16"]


def test_two_devices_write_what_one_writes(tmp_path, model_dir, text_file, capfd):
    prune = ["prune", str(model_dir), *QUICK, "--calibration", str(text_file), "--rebuild", "swaps"]
    assert main([*prune, "--device", "cpu", "-o", str(tmp_path / "one")]) == 0
    capfd.readouterr()
    assert main([*prune, "--device", "cpu,cpu", "-o", str(tmp_path / "two")]) == 0
    assert capfd.readouterr().out.count("written to") == 1
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_two_devices_refine_as_one(tmp_path, model_dir, text_file, capfd):
    calibration = ["--calibration", str(text_file), "--samples", "6", "--sequence-length", "16"]
    prune = ["prune", str(model_dir), "--sparsity", "0.5", *calibration, "--rebuild", "none", "--quiet"]
    assert main([*prune, "-o", str(tmp_path / "sparse")]) == 0
    refine = ["refine", str(tmp_path / "sparse"), *calibration]
    assert main([*refine, "-o", str(tmp_path / "one")]) == 0
    capfd.readouterr()
    assert main([*refine, "--device", "cpu,cpu", "-o", str(tmp_path / "two")]) == 0
    assert capfd.readouterr().out.count("written to") == 1
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert main([*refine, "--device", "cpu,cpu", "--samples", "3", "-o", str(tmp_path / "three")]) == 2
    err = capfd.readouterr().err
    assert err.count("optimum-barber: ") == err.count("samples 3 is not legal: at least 4, 2 for each of 2 ranks") == 1
    assert not (tmp_path / "three").exists()


def test_a_failure_of_the_ranks_is_told_once(tmp_path, model_dir, text_file, capfd):
    prune = ["prune", str(model_dir), *QUICK, "--calibration", str(text_file), "-o", str(tmp_path / "out")]
    assert main([*prune, "--samples", "1", "--device", "cpu,cpu"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("optimum-barber: ") == err.count("samples 1 are fewer than the 2 ranks") == 1
    assert not list(tmp_path.iterdir())


COMPARE = ["--producers", "wanda", "magnitude", "--rebuilds", "none", "swaps", "--sparsities", "0.5"]
SWEEP = ["--scorers", "bip", "magnitude", "--remove", "0.3", "0.5", "--no-latency"]
MEASURED = ("seconds", "peak_memory", "evaluation_seconds")


def figures(record):
    """A cell without what is measured by the clock."""
    if isinstance(record, list):
        return [figures(item) for item in record]
    if isinstance(record, dict):
        return {name: figures(value) for name, value in record.items() if name not in MEASURED}
    return record


@pytest.mark.parametrize(("command", "axes"), [("compare", COMPARE), ("sweep", SWEEP)])
def test_two_devices_share_the_cells_of_a_table(tmp_path, model_dir, text_file, capfd, command, axes):
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), "--windows", "2"]
    table = [command, str(model_dir), *axes, *texts, "--samples", "4", "--sequence-length", "16"]
    told, cells = {}, {}
    for devices in ("cpu", "cpu,cpu"):
        output = tmp_path / devices
        assert main([*table, "--device", devices, "-o", str(output)]) == 0
        told[devices] = [line.split()[0] for line in capfd.readouterr().out.splitlines() if "perplexity" in line]
        files = [*output.glob("dense.json"), *output.glob("cells/*.json")]
        cells[devices] = {path.name: figures(json.loads(path.read_text())) for path in files}
    assert told["cpu,cpu"] == told["cpu"]
    assert len(cells["cpu"]) >= 5 and cells["cpu,cpu"] == cells["cpu"]
    assert main([*table, "--device", "cpu", "-o", str(output)]) == 0  # every cell is there already
    assert capfd.readouterr().out.count("(as before)") == len(cells["cpu"])


def test_a_table_filled_anew_tells_no_figure_of_before(tmp_path):
    told = []

    def fill(fingerprint, value):
        table = CellTable(tmp_path, {"dense": fingerprint, "one": fingerprint})
        earlier = table.read_all()
        return table.fill(
            earlier,
            lambda name, records: {"fingerprint": fingerprint, "value": value},
            lambda name, record, reused: told.append((name, record["value"], reused)),
        )

    fill("old", 1)
    (tmp_path / "cells" / "one.json").write_text("{")  # damaged
    fill("old", 2)
    fill("new", 3)
    assert told == [
        ("dense", 1, False), ("one", 1, False), ("dense", 1, True), ("one", 2, False), ("dense", 3, False),
        ("one", 3, False),
    ]  # fmt: skip


def test_what_a_cell_is_does_not_depend_on_the_number_of_the_device(model_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "summing_device", torch.device)
    monkeypatch.setattr(runner, "summing_device", torch.device)
    monkeypatch.setattr(fingerprint, "fast_precision", lambda device: "high")
    compared, swept = [], []
    for name in ("cuda:0", "cuda:1"):
        base = BarberConfig(device=name, calibration=["pydoc"])
        settings = CompareSettings(producers=["wanda"], rebuilds=["none"], sparsities=[0.5], evaluation="pydoc")
        compared.append(plan.plan_of(str(model_dir), tmp_path / "out", settings, base).fingerprints)
        axes = {"scorers": ["bip"], "remove": [0.3], "samples": [2], "calibration": {"texts": ["pydoc"]}}
        config = SweepConfig(**axes, evaluation="pydoc", device=name)
        swept.append(runner._fingerprints(resolve_model(str(model_dir)), config, {"cell": config.cells()[0]}))
    assert compared[0] == compared[1]
    assert swept[0] == swept[1]


def test_bad_input_of_a_shared_table_is_told_once_before_any_work(tmp_path, model_dir, text_file, capfd):
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), "--samples", "4"]
    table = ["compare", str(model_dir), "--producers", "wnda", "--rebuilds", "none", "--sparsities", "0.5", *texts]
    assert main([*table, "--device", "cpu,cpu", "-o", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert err.count("optimum-barber: ") == err.count("unknown producer 'wnda'") == 1
    assert not (tmp_path / "out").exists()


def ranks_of(parent):
    """Process ids of the ranks that a process has started."""
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(parent)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("sent", "group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -signal.SIGKILL)],
)
def test_nothing_outlives_the_command(tmp_path, model_dir, text_file, sent, group, status):
    long = ["--samples", "2048", "--sequence-length", "64"]  # minutes, if nobody ends it
    command = ["prune", model_dir, *QUICK, *long, "--calibration", text_file, "--device", "cpu,cpu", "-o"]
    arguments = [str(argument) for argument in (*command, tmp_path / "out")]
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
    command = [sys.executable, "-m", "optimum_barber", *arguments]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear)
    while not list(tmp_path.iterdir()) and run.poll() is None:
        time.sleep(0.1)
    processes = ranks_of(run.pid)
    (os.killpg if group else os.kill)(run.pid, sent)
    told = run.communicate(timeout=120)[1]
    assert run.returncode == status and len(processes) == 2
    assert "Traceback" not in IGNORED.sub("", told)
    if not IGNORED.search(told):  # there Python has swallowed the interrupt, and only the exit status tells it
        assert told.count("interrupted") == int(group)
    ended_by = time.monotonic() + 60
    while any(map(alive, processes)):
        assert time.monotonic() < ended_by
        time.sleep(0.1)


def test_nobody_waits_for_a_rank_that_failed():
    assert run_on(["cpu", "cpu"], {}, ranks.leave_a_group_open) == 2


@pytest.mark.parametrize(
    ("ended_with", "status"), [([0, 0], 0), ([2, 1], 2), ([1, 2], 2), ([1, 1], 1), ([1, -9], 137), ([0, 130], 130)]
)
def test_the_status_is_that_of_the_first_failure(ended_with, status):
    assert status_of(ended_with) == status


def test_all_are_the_accelerators_of_the_machine(monkeypatch):
    monkeypatch.setattr(device, "accelerator", lambda: None)
    with pytest.raises(BarberError, match="device 'all' finds no accelerator on this machine: give cpu"):
        device_names("all")
    monkeypatch.setattr(device, "accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(device, "accelerator_count", lambda: 2)
    assert device_names("all") == ["xpu:0", "xpu:1"] and device_names("cpu,cuda:1") == ["cpu", "cuda:1"]
    for choose in (choose_device, available_device):
        with pytest.raises(BarberError, match="'all' names 2 devices, this works on one: give one of xpu:0, xpu:1"):
            choose("all")


def test_other_commands_work_on_one_device(monkeypatch, model_dir, text_file, capsys):
    assert main(["eval", str(model_dir), "--perplexity", str(text_file), "--device", "cpu,cpu"]) == 2
    assert "eval works on one device, 'cpu,cpu' are 2: give cpu" in capsys.readouterr().err
    for name, value in environment_of(rank=1, count=2, port=1).items():
        monkeypatch.setenv(name, value)
    args = build_parser().parse_args(["prune", str(model_dir), *QUICK, "--device", "cpu,cpu", "-o", "out"])
    with pytest.raises(BarberError, match="'cpu,cpu' starts a process for each device: start it without a launcher"):
        _run(args)
