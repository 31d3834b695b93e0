"""Progress bars of all libraries: none where the output is no terminal, or none are wanted."""

import io
import sys

import pytest
import tqdm
import tqdm.auto

from optimum_barber.base.bars import hidden_bars
from optimum_barber.cli import inspect, main
from optimum_barber.models.loading import load_model, resolve_model

from .conftest import tiny_model
from .gguf_files import write_gguf


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(bar, quiet):
    """What a bar that nothing else switches off draws on standard error."""
    with hidden_bars(quiet):
        for _ in bar(range(3), disable=False):
            pass
    return bool(sys.stderr.getvalue())


CASES = [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False)]


@pytest.mark.parametrize(("stream", "quiet", "seen"), CASES)
@pytest.mark.parametrize("bar", [tqdm.tqdm, tqdm.auto.tqdm])
def test_bars_are_drawn_on_a_terminal_alone(bar, stream, quiet, seen, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    before = tqdm.tqdm.__init__
    assert drawn(bar, quiet) == seen
    assert tqdm.tqdm.__init__ is before


def test_bars_of_other_libraries_are_among_them(monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(logging, "_tqdm_active", True)
    assert not drawn(logging.tqdm, quiet=False)
    hub = pytest.importorskip("huggingface_hub.utils").tqdm
    assert not drawn(hub, quiet=False)


def test_a_gguf_file_is_loaded_without_a_bar_though_transformers_draws_one(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gguf")
    from transformers.utils import logging

    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(intermediate_size=64, head_dim=8))
    monkeypatch.setattr(logging, "_tqdm_active", True)
    load_model(resolve_model(str(path)))
    drawn = capfd.readouterr().err
    assert "de-quantizing" in drawn and "Loading weights" in drawn
    monkeypatch.setattr(inspect, "run", lambda args: load_model(resolve_model(args.model)) and 0)
    assert main(["inspect", str(path)]) == 0
    assert capfd.readouterr().err == ""
