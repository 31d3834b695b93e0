"""What a notebook shows of results: a line and a table, with nothing in it that a name could break."""

from html.parser import HTMLParser

import pytest

from optimum_barber import (
    BarberConfig,
    BarberPermuter,
    BarberRefiner,
    BarberShrinker,
    BarberSparsifier,
    PermuteConfig,
    RefineConfig,
    ShrinkConfig,
    SweepConfig,
    run_sweep,
)
from optimum_barber.base.notebook import notebook_table
from optimum_barber.runs.compare import compare

from .conftest import tiny_model, tiny_windows


class Tables(HTMLParser):
    """The cells of all tables, and whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.tags = [], [], set()

    def handle_starttag(self, tag, _):
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.cells.append(data)


def cells_of(shown):
    parser = Tables()
    parser.feed(shown)
    assert not parser.open and parser.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    return parser.cells


def test_numbers_are_short_and_names_are_text():
    rows = [{"name": "<script>x</script> & co", "error": 0.123456789, "count": 1234567, "flag": True}, {"name": "b"}]
    shown = notebook_table("a < b", rows, ["name", "error", "count", "flag"])
    assert cells_of(shown) == [
        "name", "error", "count", "flag", "<script>x</script> & co", "0.12346", "1,234,567", "True", "b",
    ]  # fmt: skip
    assert "a &lt; b" in shown


@pytest.fixture(scope="module")
def sparse(model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("notebook") / "out"
    config = BarberConfig(sparsity=0.5)
    return BarberSparsifier.from_pretrained(model_dir).sparsify(config, tiny_windows(), save_dir=output, quiet=True)


def test_a_pruning_run_and_each_of_its_blocks(sparse):
    cells = cells_of(sparse._repr_html_())
    assert [cell for cell in cells if cell.startswith("model.layers")] == [report.block for report in sparse.reports]
    assert f"{sparse.reports[0].error_after:.5g}" in cells
    assert f"{sparse.reports[1].swaps:,}" in cells_of(sparse.reports[1]._repr_html_())
    assert str(sparse.directory) in sparse._repr_html_()


def test_the_other_tools(sparse, model_dir):
    refined = BarberRefiner.for_checkpoint(sparse.directory).refine(
        sparse.directory, RefineConfig(steps=2), tiny_windows(), quiet=True
    )
    assert f"{refined.looks[0]['divergence']:.5g}" in cells_of(refined._repr_html_())
    small = BarberShrinker(tiny_model()).shrink(ShrinkConfig(remove=0.3), tiny_windows(), latency=False, quiet=True)
    assert f"{small.report['after']['parameters']:,}" in cells_of(small._repr_html_())
    permuted = BarberPermuter(tiny_model()).permute(PermuteConfig(pattern="2:4"), tiny_windows(), quiet=True)
    assert "values" in cells_of(permuted._repr_html_())


def test_comparisons_and_sweeps(model_dir, tmp_path):
    settings = {"calibration": {"texts": ["pydoc"], "samples": 2, "sequence_length": 16}, "evaluation": "pydoc"}
    done = compare(
        str(model_dir), tmp_path / "compared", producers=["magnitude"], rebuilds=["none"], sparsities=[0.5], windows=2,
        quiet=True, **settings,
    )  # fmt: skip
    cells = cells_of(done._repr_html_())
    assert "dense" in cells and f"{next(iter(done.cells.values()))['perplexity']['perplexity']:.5g}" in cells
    texts = {"texts": ["pydoc"], "sequence_length": 16}
    config = SweepConfig(
        scorers=["magnitude"], remove=[0.3], samples=[2], windows=2, evaluation="pydoc", calibration=texts
    )
    swept = run_sweep(str(model_dir), config, tmp_path / "swept", quiet=True)
    assert "magnitude" in cells_of(swept._repr_html_())
