"""The code keeps its shape: small files, small functions, imports in one direction, no hidden machine."""

import ast
import re
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "optimum_barber"
FILES = sorted(PACKAGE.rglob("*.py"))
TENSORS = [
    "masks",
    "scores",
    "rebuild",
    "semi_structured",
    "statistics",
    "patterns",
    "budget",
    "activations",
    "sums",
    "derivatives",
    "judges",
    "trial",
    "swaps",
    "dsnot",
    "quadratic",
    "least_squares",
    "selection",
    "distribution",
    "quantize",
    "gptq",
    "structured/scores",
    "refine/divergence",
]


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node, node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_small():
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 300
    lengths = [length for *_, length in functions()]
    assert statistics.median(lengths) <= 10
    assert sum(length > 40 for length in lengths) <= 3
    assert max(lengths) <= 50


def test_the_loop_over_layers_and_blocks_fits_a_screen():
    loop = next(length for path, node, length in functions() if path.name == "pipeline.py" and node.name == "prune")
    assert loop <= 40


@pytest.mark.parametrize("name", ["magnitude", "wanda", "random", "masks"])
def test_producers_are_short(name):
    assert len((PACKAGE / "producers" / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_code_knows_nothing_of_models(name):
    imports = re.findall(r"^\s*(?:from|import) (\S+)", (PACKAGE / f"{name}.py").read_text(), re.M)
    assert not {i.lstrip(".").split(".")[0] for i in imports} & {"transformers", "pipeline", "blocks", "source", "cli"}


def test_nothing_prints_in_the_library():
    calls = [
        (path.name, node.lineno)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert {name for name, _ in calls} <= {"__init__.py"}
