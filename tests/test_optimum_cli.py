"""`optimum-cli barber` does what `optimum-barber` does: output, exit status, masks."""

import subprocess
import sys

import pytest

from optimum_barber.checkpoints.record import read_record
from optimum_barber.cli import COMMANDS, main

QUICK = ["--calibration", "pydoc", "--samples", "4", "--sequence-length", "16", "--sparsity", "0.5"]


@pytest.fixture
def both(capsys, monkeypatch):
    """Run a command through both front ends: exit status, output and errors of each."""
    from optimum.commands import optimum_cli

    def run(*arguments):
        command = [str(argument) for argument in arguments]
        capsys.readouterr()
        own = _status(lambda: main(command)), *capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "barber", *command])
        return own, (_status(optimum_cli.main), *capsys.readouterr())

    return run


def _status(front_end):
    try:
        return front_end()
    except SystemExit as ended:
        return ended.code


def test_the_same_output_and_status(both, model_dir):
    for command, line in [(["plugins"], "wanda"), (["inspect", model_dir], "llama (table)")]:
        (status, own, _), (other_status, optimum, _) = both(*command)
        assert own.split("\ntime ")[0] == optimum.split("\ntime ")[0]  # the time is measured anew
        assert status == other_status == 0
        assert line in own


def test_the_same_masks(model_dir, tmp_path, capsys, monkeypatch):
    from optimum.commands import optimum_cli

    command = ["prune", str(model_dir), *QUICK, "--quiet", "-o"]
    assert main([*command, str(tmp_path / "own")]) == 0
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "barber", *command, str(tmp_path / "optimum")])
    assert _status(optimum_cli.main) == 0
    assert read_record(tmp_path / "own").fingerprint == read_record(tmp_path / "optimum").fingerprint
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "barber", "verify", str(tmp_path / "optimum")])
    assert _status(optimum_cli.main) == 0
    assert "all as recorded" in capsys.readouterr().out


def test_the_same_cut(both, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that both write to a folder of the same name
    command = ["shrink", model_dir, "--remove", "0.3", *QUICK[:6], "--no-latency", "-o", "out", "--overwrite"]
    own, optimum = both(*command)
    assert own == optimum
    assert own[0] == 0
    assert "heads a layer        4 -> 2" in own[1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prune", "MODEL", "--sparsity", "2", "-o", "OUT"], "sparsity 2.0 is outside"),
        (["prune", "MODEL", "--producer", "wandda", *QUICK, "-o", "OUT"], "did you mean 'wanda'"),
        (["shrink", "MODEL", "--remove", "2", "-o", "OUT"], "remove 2 is not legal"),
        (["verify", "MODEL"], "is no pruned checkpoint"),
        (["inspect", "/none"], "/none"),
    ],
)
def test_bad_input_is_one_line_and_status_2(both, model_dir, tmp_path, command, message):
    names = {"MODEL": model_dir, "OUT": tmp_path / "out"}
    own, optimum = both(*(names.get(part, part) for part in command))
    assert own == optimum
    assert own[0] == 2
    assert message in own[2]
    assert len(own[2].strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_commands_end_with_status_2(both):
    own, optimum = both("no-such-command")
    assert own[0] == optimum[0] == 2
    assert "invalid choice: 'no-such-command'" in own[2]
    assert "invalid choice: 'no-such-command'" in optimum[2]


def test_the_console_script_lists_every_command():
    script = "from optimum.commands.optimum_cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "barber", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert "Prune a causal LM and rebuild its sparsity mask." in done.stdout
