"""Every marked example of the README and of the documents, run on a tiny model as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from optimum_barber.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    (page, language, code)
    for page in PAGES
    for language, code in re.findall(r"<!-- test -->\n```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
]

pytestmark = pytest.mark.usefixtures("no_charts")  # test_report and test_compare draw them
FILES = re.compile(r"<!-- file (\S+) -->\n```\w+\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_dir):
    """A folder in which MODEL is the tiny checkpoint, shared by all examples of a page."""
    folders = {}

    def of(page):
        if page not in folders:
            folders[page] = tmp_path_factory.mktemp(page.stem)
            (folders[page] / "MODEL").symlink_to(model_dir)
            for name, content in FILES.findall(page.read_text(encoding="utf-8")):
                (folders[page] / name).write_text(content, encoding="utf-8")
        return folders[page]

    return of


@pytest.mark.parametrize(
    ("page", "language", "code"), EXAMPLES, ids=[f"{page.name}-{i}" for i, (page, *_) in enumerate(EXAMPLES)]
)
def test_the_example_runs(page, language, code, folder, monkeypatch):
    monkeypatch.chdir(folder(page))
    if language == "python":
        exec(compile(code, page.name, "exec"), {"__name__": "example"})
        return
    for line in code.strip().splitlines():
        assert main(shlex.split(line)[1:]) == 0, line


def test_there_are_examples():
    assert len([page for page, *_ in EXAMPLES if page.name == "README.md"]) >= 5
