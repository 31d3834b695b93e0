"""`optimum-barber report`: the page says what the run measured, to every reader."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from optimum_barber.cli import main
from optimum_barber.runs.report.html import html
from optimum_barber.runs.report.page import Bars, Heat, Lines, Page, Section, Series, Table
from optimum_barber.runs.report.write import page_of

from . import browser

VOID = {"meta", "link", "path", "rect", "br"}


class Reader(HTMLParser):
    """Reads a page: every element in its place, ids, headings, labels, exact numbers by table."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.headings, self.tables = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self.tables[f"{len(self.tables)}"] = []
        if tag == "tr":
            self.tables[f"{len(self.tables) - 1}"].append([])
        if tag == "data":
            self.tables[f"{len(self.tables) - 1}"][-1].append(float(attributes["value"]))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def rows(self):
        """The exact numbers of every row of every table."""
        return [row for table in self.tables.values() for row in table]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_dir):
    """A pruned checkpoint."""
    output = tmp_path_factory.mktemp("run") / "out"
    flags = [
        "--sparsity",
        "0.5",
        "--rounds",
        "2",
        "--calibration",
        "pydoc",
        "--samples",
        "8",
        "--sequence-length",
        "16",
    ]
    assert main(["prune", str(model_dir), *flags, "--quiet", "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def text(run):
    return html(page_of(run))


def test_the_page_is_whole_and_alone(text):
    page = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in page.elements
    assert "http" not in text
    assert not re.search(r"<script|@import|url\(|src=", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"]
    assert set(targets) <= set(ids)
    assert page.headings[0] == 1
    assert all(later <= earlier + 1 for earlier, later in zip(page.headings, page.headings[1:], strict=False))


def test_every_chart_can_be_heard_and_read(text):
    pytest.importorskip("matplotlib")
    page = Reader(text)
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(charts) >= 9
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 20 for attributes in charts)
    assert text.count("<figure>") == text.count("<figcaption>") == len(charts) == text.count("<details><summary>") - 2
    assert all("tabindex" in attributes for tag, attributes in page.elements if attributes.get("class") == "scroll")


def test_the_numbers_are_those_of_the_report(run, text):
    report, rows = json.loads((run / "report.json").read_text()), Reader(text).rows()
    for block in report["blocks"]:
        assert any(block["error_before"] in row and block["error_after"] in row for row in rows)
    for key in ("error_before", "error_after", "swaps", "pairs"):
        assert [report[key]] in rows
    modules = json.loads((run / "sparsity_config.json").read_text())["modules"]
    assert all(module["sha256"] in text for module in modules.values())


def test_the_swapped_share_is_marked(run, text):
    pytest.importorskip("matplotlib")
    report = json.loads((run / "report.json").read_text())
    record = next(r["rounds"][0] for r in report["blocks"] if r["rounds"])
    assert f"α = {record['ratio']:.3g}" in text


def test_the_same_run_gives_the_same_page(run, text):
    assert html(page_of(run)) == text


def test_without_matplotlib_the_page_has_every_number(run, text, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        bare = html(page_of(run))
        assert main(["report", str(run), "-o", str(tmp_path / "all")]) == 2
    assert "pip install 'optimum-barber[report]'" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
    assert bare.count("pip install &#x27;optimum-barber[report]&#x27;") == 1
    assert "<svg" not in bare
    assert Reader(bare).rows() == Reader(text).rows()


def test_what_a_run_lacks_is_said(run, text, tmp_path):
    assert "Not measured yet" in text
    report = json.loads((run / "report.json").read_text())
    for block in report["blocks"]:
        block["rounds"], block["swaps"] = [], 0
    older = tmp_path / "older"
    older.mkdir()
    (older / "sparsity_config.json").write_bytes((run / "sparsity_config.json").read_bytes())
    (older / "report.json").write_text(json.dumps(report))
    page = html(page_of(older))
    assert "Not recorded" in page and "Not swapped" in page
    (older / "report.json").unlink()
    assert "Not here: the step" in html(page_of(older))


def test_page_and_pictures(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    measured = tmp_path / "eval.json"
    flags = ["--sequence-length", "16", "--windows", "4", "--quiet", "--json", str(measured)]
    assert main(["eval", str(run), "--perplexity", "pydoc", *flags]) == 0
    capsys.readouterr()
    assert main(["report", str(run), "-o", str(tmp_path / "all"), "--eval", str(measured)]) == 0
    assert "pictures" in capsys.readouterr().out
    pictures = sorted((tmp_path / "all").glob("*.png"))
    page = (tmp_path / "all" / "index.html").read_text(encoding="utf-8")
    assert len(pictures) == page.count("<figure>")
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    for row in json.loads(measured.read_text()):
        assert f'<data value="{row["perplexity"]!r}">' in page
    assert main(["report", str(run)]) == main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no finished run: it holds none of"),
        (["{run}", "-o", "{run}/config.json/x.html"], "there is no such folder"),
        (["{run}", "-o", "{there}"], "is there already"),
        (["{run}", "--eval", "missing.json"], "missing.json cannot be read"),
        (["{broken}"], "holds a record that is not whole"),
        (["{run}", "-o", "{run}"], "is the input"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, capsys, arguments, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{}")
    (tmp_path / "there.html").write_text("mine")
    places = {"run": run, "there": tmp_path / "there.html", "broken": tmp_path / "broken"}
    assert main(["report", *(argument.format(**places) for argument in arguments)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert (tmp_path / "there.html").read_text() == "mine"
    assert not list(tmp_path.rglob("*.partial"))


def odd_page():
    """Names that could break a page, values that could break a chart."""
    nasty = "<b>&\"' " + "long name " * 12
    series = [Series(f"{nasty} {n}", [0, 1, 2], [0.0, None, 1e-30 * n]) for n in range(8)]
    charts = [
        Lines(nasty, nasty, "x", "y", series, log_y=True),
        Lines("flat", "", "x", "y", [Series("one", [5], [3.0])], log_x=True),
        Lines("steps", "", "x", "y", [Series("pairs", [1, 10, 100], [3, 4])], log_x=True, stepped=True),
        Bars(nasty, "", "unit", {nasty: 12.0, "failed": None, "huge": 1e30}, ("dense", 3.0), log=True),
        Heat("heat", "", [str(n) for n in range(3)], [nasty, "q"], [[0.5, None], [0.0, 1.0], [0.25, 0.125]]),
    ]
    table = Table("wide", [f"column {n}" for n in range(30)], [[nasty, *range(29)]])
    return Page(nasty, nasty, [Section("odd", [nasty, *charts, table, Section("deeper", ["Not here."])])])


def test_odd_names_and_values_do_not_break_a_page():
    text = html(odd_page())
    page = Reader(text)
    assert (
        "<b>" not in text
        and "nan" not in re.findall(r' d="[^"]*"', text)
        and "inf" not in "".join(re.findall(r' d="[^"]*"', text))
    )
    assert page.headings == [1, 2, 3]


@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("which", ["run", "odd"])
def test_a_browser_shows_it_without_error_or_overflow(run, tmp_path, which, width):
    text = html(page_of(run) if which == "run" else odd_page())
    result, console = browser.probe(text, tmp_path, width)
    assert console == []
    assert result["scroll"] <= result["client"] == width
    assert result["wide"] == []
    assert result["title"]
    assert min(result["drawn"]) > 40


@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_browser_takes_a_picture_of_it(run, tmp_path):
    assert main(["report", str(run), "-o", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert browser.screenshot(tmp_path / "page.html", tmp_path / "page.png", tmp_path) == (1200, 2400)
    assert (tmp_path / "page.png").stat().st_size > 50_000
