"""What the command line tells the libraries below torch before it is imported, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

from optimum_barber.base.memory import KERNEL_CACHES, KERNELS_KEPT

SCRIPT = """
import os, sys
from optimum_barber.cli import main
assert "torch" not in sys.modules
try: main(["--help"])
except SystemExit: pass
assert "torch" not in sys.modules
import torch
print({name: value for name, value in os.environ.items() if name in sys.argv[1:]})
print(torch.__config__.parallel_info())
"""
NAMES = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"]


@pytest.mark.parametrize(
    "variables", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "1"}]
)
def test_the_command_line_sets_the_wait_policy_before_torch_is_imported(variables):
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment = {**others, **variables, "OMP_DISPLAY_ENV": "TRUE"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *NAMES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(variables or {"OMP_WAIT_POLICY": "PASSIVE"}) in done.stdout
    if "OMP_WAIT_POLICY" in done.stderr:  # what the library of this machine has read
        assert variables or "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


@pytest.mark.parametrize("capacity", [None, "500"])
def test_the_command_line_bounds_the_compiled_kernels_that_onednn_keeps(capacity):
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    environment |= dict.fromkeys(KERNEL_CACHES, capacity) if capacity else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *KERNEL_CACHES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(f"'{name}': '{capacity or KERNELS_KEPT}'" in done.stdout for name in KERNEL_CACHES)
