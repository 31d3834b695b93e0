"""Everything that works on a device, on a simulated one: nothing is mixed, and the bits are the CPU's."""

import json
import subprocess
import sys

import pytest
import torch
from packaging.version import Version
from torch.utils import backend_registration

from .device_runs import BLOCKS, RUNS
from .second_device import ROOT

SYNCS_A_BLOCK = 95  # of a default run of the smallest model, with what it costs to begin and to end

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch that takes a device written in Python",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcomes of all runs, in a process of their own: the device's name is one for the whole process."""
    output = tmp_path_factory.mktemp("device") / "outcomes.jsonl"
    command = [sys.executable, "-m", "tests.device_runs", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["name"]: line for line in map(json.loads, output.read_text().splitlines())}


@pytest.mark.parametrize("name", RUNS)
def test_a_device_has_the_bits_of_the_cpu(outcomes, name):
    if name == "LoRA under masks" and Version(torch.__version__) >= Version("2.14"):
        pytest.skip("checkpointing of this torch restores no mode that simulates a device while it recomputes")
    assert "error" not in outcomes[name], outcomes[name]["error"]
    assert outcomes[name]["device"] == outcomes[name]["cpu"]


@pytest.mark.parametrize("name", ["prune: the default", "syncs: more rows and columns", "syncs: more samples"])
def test_the_host_waits_no_more_often_for_larger_models_and_more_samples(outcomes, name):
    syncs = outcomes[name]["syncs"]
    assert sum(syncs.values()) <= SYNCS_A_BLOCK * BLOCKS, syncs
