"""Every marked example of the README, run on a tiny model as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from optimum_barber.cli import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- test -->\n```(\w+)\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_dir):
    """A folder in which MODEL is the tiny checkpoint, shared by all examples."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "MODEL").symlink_to(model_dir)
    return folder


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=range(len(BLOCKS)))
def test_the_example_runs(language, code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if language == "python":
        exec(compile(code, "README.md", "exec"), {})
        return
    for line in code.strip().splitlines():
        assert main(shlex.split(line)[1:]) == 0, line


def test_there_are_examples():
    assert len(BLOCKS) >= 5
