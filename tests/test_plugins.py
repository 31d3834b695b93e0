"""Packages of others: found, named, used; and what is broken in one of them stays there."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_barber.base.errors import BarberError
from optimum_barber.prune.contract import ask
from optimum_barber.prune.producers import PRODUCERS, LinearInput, Produced, Producer
from optimum_barber.tensors.input_statistics import InputStatistics
from optimum_barber.tensors.patterns import SparsityPattern

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "barber-ria"
BAD = """
import torch
from optimum_barber.prune.producers import producer
{}
@producer("short")
def short(linear):
    return linear.weight[:1] > 0

@producer("floats")
def floats(linear):
    return (linear.weight > 0).float()

@producer("sparse")
def sparse(linear):
    return torch.zeros_like(linear.weight, dtype=torch.bool)

@producer("careless")
def careless(linear):
    linear.weight[linear.weight < 0] = 0
    return linear.weight != 0
"""
GROUPS = {
    "barber_bad": {"producers": ["short", "floats", "sparse", "careless"]},
    "barber_late": {"producers": ["short"], "calibration": ["pydoc"]},
    "barber_broken": {"producers": ["lost"], "rebuilders": ["gone"]},
    "barber_number": {"producers": ["answer"]},
}
CODE = {
    "barber_bad": BAD.format(""),
    "barber_late": "def short(linear): ...\ndef pydoc(split): ...\n",
    "barber_broken": "import a_module_that_is_nowhere\n",
    "barber_number": "answer = 42\n",
}


def install(site, module, version="1.5"):
    """What pip would leave of a package of one module."""
    (site / f"{module}.py").write_text(CODE[module])
    info = site / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
    lines = [
        f"[optimum_barber.{group}]\n" + "\n".join(f"{n} = {module}:{n}" for n in names)
        for group, names in GROUPS[module].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def ria_site(tmp_path_factory):
    """A folder for the path with the example package in it, installed by pip."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "barber-ria")
    site = tmp_path_factory.mktemp("site")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *flags], check=True)
    return site


@pytest.fixture
def site(ria_site, tmp_path):
    """The same, and room for worse packages."""
    return Path(shutil.copytree(ria_site, tmp_path / "site"))


def run(site, *words):
    """A command with `site` on the path."""
    command = [str(Path(sys.executable).parent / words[0]), *map(str, words[1:])]
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OPTIMUM_BARBER_CACHE": str(site / "cache"),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True)


EACH = """
import contextlib, io, json, sys
from optimum_barber.cli import main
done = []
for words in json.loads(sys.argv[1]):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(words)
    done.append((status, out.getvalue(), error.getvalue()))
print(json.dumps(done))
"""


def run_each(site, *commands):
    """Status, output and errors of several commands, in one process with `site` on the path."""
    words = [[*map(str, command)] for command in commands]
    done = run(site, "python", "-c", EACH, json.dumps(words))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def prune(model_dir, text_file, output, producer):
    """The words of a command."""
    flags = ["--sparsity", ".5", "--calibration", text_file, "--samples", 2, "--sequence-length", 16, "--quiet"]
    return ["prune", model_dir, "--producer", producer, *flags, "-o", output]


def line_of(listing, name, package):
    return next(line for line in listing.splitlines() if line.split()[:2] == [name, package])


def test_the_example_is_listed_by_both_command_lines_and_prunes(ria_site, model_dir, text_file, tmp_path):
    listing = run(ria_site, "optimum-barber", "plugins").stdout
    line = line_of(listing, "ria", "barber-ria").split()
    assert line == "ria barber-ria 0.1.0 ok needs input_norm; takes power=0.5, scope=layer".split()
    assert run(ria_site, "optimum-cli", "barber", "plugins").stdout == listing
    done = run(ria_site, "optimum-barber", *prune(model_dir, text_file, tmp_path / "out", "ria"))
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "out" / "sparsity_config.json").read_text())
    assert (record["producer"]["name"], record["sparsity"]) == ("ria", 0.5)


def test_the_example_works_in_a_recipe_and_through_lm_eval(ria_site, model_dir, text_file, tmp_path):
    calibration = f"{{texts: [{text_file}], samples: 2, sequence_length: 16}}"
    stages = "[{prune: {producer: ria, pattern: 2:4, producer_args: {power: 1.0}}}]"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model_dir}\ncalibration: {calibration}\nstages: {stages}\noutput: {tmp_path / 'out'}\n")
    arguments = f"pretrained={model_dir},producer=ria,power=0.5,rebuild=none,sparsity=0.5,samples=2"
    arguments += f",calibration={text_file},sequence_length=16"
    flags = ["--tasks", f"rolling:{text_file}", "--limit", 1, "--output_path", tmp_path / "results"]
    evaluate = ["lm-eval", "run", "--model", "barber", "--model_args", arguments, *flags]
    first, second = run_each(ria_site, ["run", recipe, "--quiet"], evaluate)
    assert (first[0], "zeros 7,680" in first[1]) == (0, True), first[2]
    assert second[0] == 0, second[2]
    saved = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())
    assert saved["config"]["sparsity"]["producer"]["name"] == "ria"


def test_broken_packages_are_named_with_their_own_error_and_stop_nobody(site, model_dir, text_file, tmp_path):
    for module in CODE:
        install(site, module)
    commands = [prune(model_dir, text_file, tmp_path / name, name) for name in ("lost", "ria")]
    (status, listing, error), failed, done = run_each(site, ["plugins"], *commands)
    assert (status, error) == (0, "")
    lost = "barber-broken 1.5 BROKEN ModuleNotFoundError: No module named 'a_module_that_is_nowhere'".split()
    assert line_of(listing, "lost", "barber-broken").split()[1:] == lost
    assert line_of(listing, "gone", "barber-broken").split()[1:] == lost
    assert "clashes with barber-late 1.5" in line_of(listing, "short", "barber-bad")
    assert "clashes with built-in" in line_of(listing, "pydoc", "barber-late")
    assert "class int, no producer" in line_of(listing, "answer", "barber-number")
    working = [line_of(listing, *words).split()[3] for words in (("ria", "barber-ria"), ("wanda", "built-in"))]
    assert working == ["ok", "ok"]
    assert failed[0] == 2
    assert "producer 'lost' of barber-broken 1.5 cannot be loaded: ModuleNotFoundError: No module" in failed[2]
    assert not (tmp_path / "lost").exists()
    assert done[0] == 0, done[2]


def test_bad_masks_are_named_with_what_was_expected(site, model_dir, text_file, tmp_path):
    install(site, "barber_bad")
    first = "model.layers.0.self_attn.q_proj"
    messages = {
        "short": f"its mask for {first} is torch.bool (1, 32), expected torch.bool (32, 32)",
        "floats": f"its mask for {first} is torch.float32 (32, 32), expected torch.bool (32, 32)",
        "sparse": f"its mask for {first} prunes 1024 of 1024 weights, expected 512",
        "careless": f"it changed the weight of {first} in place; work on a copy",
    }
    flags = ["--sparsity", ".5", "--calibration", text_file, "--samples", 1, "--sequence-length", 16, "--quiet"]
    command = ["prune", model_dir, *flags, "-o", tmp_path / "out", "--producer"]
    done = run_each(site, *([*command, name] for name in messages))
    lines = [f"optimum-barber: producer barber_bad.{name}: {message}\n" for name, message in messages.items()]
    assert done == [[2, "", line] for line in lines]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "weight", [torch.ones(3, 4), torch.ones(4, 4, dtype=torch.int8), torch.full((4, 4), torch.nan)]
)
def test_bad_new_weights_are_named(weight):
    keep = torch.tensor([[True, False]]).expand(4, 2).repeat(1, 2)
    linear = LinearInput("layer.up", torch.ones(4, 4), SparsityPattern(0.5))
    with pytest.raises(BarberError, match=r"its weight for layer.up (is torch|has NaN)"):
        ask(Producer(lambda linear: Produced(keep, weight)), linear, {}, True)
    made = ask(Producer(lambda linear: Produced(keep, torch.where(keep, 2.0, torch.nan))), linear, {}, True)
    assert torch.equal(made.keep, keep)


@pytest.fixture(scope="module")
def ria():
    """The example's function, imported from its file."""
    spec = importlib.util.spec_from_file_location("barber_ria", EXAMPLE / "barber_ria.py")
    module = importlib.util.module_from_spec(spec)
    with PRODUCERS.temporarily():
        spec.loader.exec_module(module)
        yield module.ria


@pytest.mark.parametrize("pattern", [SparsityPattern(0.5), SparsityPattern(0.7), SparsityPattern(0.5, 2, 4)])
@pytest.mark.parametrize(("scope", "power"), [("layer", 0.5), ("row", 0.5), ("row", 0.0)])
def test_ria_does_what_the_paper_says(ria, pattern, scope, power):
    generator = torch.Generator().manual_seed(1)
    weight, norms = torch.randn(6, 8, generator=generator), torch.rand(8, generator=generator)
    keep = ria(LinearInput("up", weight, pattern, InputStatistics(input_norm=norms)), power=power, scope=scope)
    magnitudes = weight.double().abs().tolist()
    scores = [
        [
            (w / sum(row) + w / sum(other[j] for other in magnitudes)) * float(norms[j]) ** power
            for j, w in enumerate(row)
        ]
        for row in magnitudes
    ]
    cells = [(i, j) for i in range(6) for j in range(8)]
    if pattern.semi_structured:
        groups = [[(i, j) for i, j in cells if (i, j // 4) == key] for key in {(i, j // 4) for i, j in cells}]
    else:
        groups = [cells] if scope == "layer" else [[(i, j) for i, j in cells if i == row] for row in range(6)]
    for group in groups:
        lowest = sorted(group, key=lambda cell: scores[cell[0]][cell[1]])[: pattern.pruned(len(group))]
        assert {cell for cell in group if not keep[cell]} == set(lowest)


def test_ria_survives_dead_channels_and_refuses_an_unknown_scope(ria):
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    weight[:, 1] = weight[2] = 0
    linear = LinearInput("up", weight, SparsityPattern(0.25), InputStatistics(input_norm=torch.ones(4)))
    assert ria(linear, scope="row").sum() == 12
    with pytest.raises(BarberError, match="scope=block of producer 'ria' is not legal: layer or row"):
        ria(linear, scope="block")
