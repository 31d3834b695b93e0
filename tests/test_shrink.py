"""`shrink` as its users meet it: Python, command line, recipe, files, and what loads them without us."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import optimum_barber
from optimum_barber import BarberError, BarberShrinker, PrunedStructure, ShrinkConfig
from optimum_barber.checkpoints.structure import read_structure
from optimum_barber.cli import main
from optimum_barber.models.measure import latency, macs_per_token, size_of
from optimum_barber.models.source import ModelSource
from optimum_barber.runs.recipe import run_recipe
from optimum_barber.shrink.choose import budget_of
from optimum_barber.shrink.scorers import SCORERS
from optimum_barber.shrink.units import units_of

from .conftest import tiny_model, tiny_windows

QUICK = ["--calibration", "pydoc", "--samples", "4", "--sequence-length", "32", "--quiet", "--no-latency"]
SCHEMA = Path(optimum_barber.__file__).parent / "checkpoints" / "pruned_structure.schema.json"


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory, model_dir):
    """The tiny LLaMA without 30 % of its blocks, as the command writes it."""
    output = tmp_path_factory.mktemp("shrunk") / "out"
    assert main(["shrink", str(model_dir), "--remove", "0.3", *QUICK[:-1], "-o", str(output)]) == 0
    return output


def test_what_lies_in_the_output(shrunk, model_dir):
    record, report = read_structure(shrunk), json.loads((shrunk / "report.json").read_text())
    config = json.loads((shrunk / "config.json").read_text())
    assert config["structure_config"] == {
        "format_version": 1, "scorer": "bip", "removed": record.removed, "structure_file": "pruned_structure.json",
    }  # fmt: skip
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (2, 1, 40)
    assert record.head_unit == "key-value group"
    assert record.base_model == {"name": str(model_dir), "model_type": "llama", "dtype": "float32"}
    assert [len(layer.channels.kept) for layer in record.layers.values()] == [40, 40]
    assert record.calibration["samples"] == 4
    assert report["heads"] == {"before": 4, "after": 2}
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["after"]["latency"]["prefill"]["median"] > 0
    assert report["after"]["latency"]["decode"]["spread"] >= 0
    assert {path.name for path in model_dir.glob("token*")} <= {path.name for path in shrunk.iterdir()}


def test_the_record_has_a_schema(shrunk):
    schema = json.loads(SCHEMA.read_text())
    assert schema == PrunedStructure.model_json_schema()
    jsonschema.validate(json.loads((shrunk / "pruned_structure.json").read_text()), schema)


def test_transformers_alone_loads_it(shrunk):
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('def', return_tensors='pt').input_ids\n"
        "assert torch.isfinite(model(ids).logits).all()\n"
        "assert not any(name.startswith('optimum_barber') for name in sys.modules)\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(shrunk)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == json.loads((shrunk / "report.json").read_text())["after"]["parameters"]


def test_what_is_written_is_what_is_returned(tmp_path, tokenizer):
    model = tiny_model("phi3").to(torch.float16)
    result = BarberShrinker(model, tokenizer).shrink(
        ShrinkConfig(remove=0.4), tiny_windows(), save_dir=tmp_path / "out", latency=False, quiet=True
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in result.model.state_dict().items()
    }
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))


def test_eval_puts_the_dense_model_beside(shrunk, model_dir, capsys):
    command = ["eval", str(shrunk), "--perplexity", "pydoc", "--sequence-length", "16", "--windows", "2", "--quiet"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"{model_dir} (dense)")
    assert lines[2].startswith(str(shrunk))


def test_a_record_is_replayed(shrunk, model_dir, tmp_path):
    command = ["shrink", str(model_dir), "--structure", str(shrunk), "--quiet", "--no-latency"]
    assert main([*command, "-o", str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (shrunk / name).read_bytes()
    assert read_structure(tmp_path / "again") == read_structure(shrunk)


def test_equal_settings_give_equal_files(model_dir, tmp_path):
    for scorer in ("barber", "taylor"):
        for name in "ab":
            command = ["shrink", str(model_dir), "--remove", "0.5", "--scorer", scorer, *QUICK]
            assert main([*command, "-o", str(tmp_path / scorer / name)]) == 0
        first, second = ((tmp_path / scorer / n / "model.safetensors").read_bytes() for n in "ab")
        assert first == second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "remove is missing"),
        (["--remove", "1"], "remove 1 is not legal: a share in (0, 1)"),
        (["--remove", "half"], "remove half is not legal"),
        (["--remove-heads", "-0.1"], "remove heads -0.1 is not legal: a share in [0, 1)"),
        (["--remove", "0.2", "--remove-channels", "0.3"], "exclude each other"),
        (["--remove", "0.2", "--structure", "x"], "exclude each other"),
        (["--structure", "/none"], "structure /none does not exist"),
        (["--remove", "0.2", "--head-unit", "heads"], "unknown head unit 'heads'"),
        (["--remove", "0.2", "--round-to", "0"], "round_to 0 is not legal"),
        (["--remove", "0.2", "--scorer", "wandda"], "did you mean 'wanda'"),
        (["--remove", "0.2", "--scorer-arg", "x"], "scorer-arg 'x' is not legal"),
        (["--remove", "0.2", "--scorer-arg", "norm_gain=maybe"], "norm_gain=maybe of scorer 'bip' is no bool"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(flags, message, model_dir, tmp_path, capsys):
    assert main(["shrink", str(model_dir), *flags, *QUICK, "-o", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_output_rules_are_those_of_prune(model_dir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    command = ["shrink", str(model_dir), "--remove", "0.2", *QUICK, "-o"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert main([*command, str(model_dir / "within")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_record_of_another_model_is_refused(shrunk, tmp_path):
    content = json.loads((shrunk / "pruned_structure.json").read_text())
    config = ShrinkConfig(structure=str(tmp_path / "x.json"))
    for change, message in (
        ({"format_version": 9}, "format version 9; known is 1"),
        ({"layers": {"model.layers.0": content["layers"]["model.layers.0"]}}, "1 decoder layers, the model 2"),
        ({"scorer": None}, "is no pruned structure"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(BarberError, match=message):
            BarberShrinker(tiny_model()).shrink(config, latency=False)
    content["layers"]["model.layers.1"]["channels"]["kept"].pop()
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(BarberError, match="keeps 39 of 48 channels in model.layers.1"):
        BarberShrinker(tiny_model()).shrink(config, latency=False)


@given(st.integers(1, 60), st.sampled_from([1, 4, 16]), st.sampled_from(["group", "query"]))
def test_the_share_is_met_as_closely_as_channels_allow(percent, step, unit):
    model = tiny_model()
    layer = model.model.layers[0]
    units = units_of(ModelSource(model), unit)
    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    total = sum(m.weight.numel() for m in linears)
    try:
        budget = budget_of(ShrinkConfig(remove=percent / 100, round_to=step, head_unit=unit), layer, units, linears)
    except BarberError as error:
        assert "removes nothing" in str(error)
        return
    channel = units["channels"].parameters(layer) * step / total
    assert budget.kept["channels"] % step == 0
    slack = units["heads"].parameters(layer) * units["heads"].groups / total / 2
    at_most = budget.kept["channels"] in (48, step)
    assert abs(budget.share - percent / 100) <= channel / 2 + 1e-9 or (at_most and budget.share < percent / 100 + slack)


def test_sizes_and_macs_are_counted():
    model = tiny_model()
    assert size_of(model) == {"parameters": model.num_parameters(), "weight_bytes": 4 * model.num_parameters()}
    blocks = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * 2 * 16 * 32  # layers, products with keys and values, tokens, heads x size
    assert macs_per_token(model.config, 16) == blocks + attention + 300 * 32


@torch.no_grad()
def test_the_error_by_layer_is_that_of_the_hidden_states():
    model, windows = tiny_model(), tiny_windows(6)
    result = BarberShrinker(model).shrink(ShrinkConfig(remove=0.5), windows, latency=False, quiet=True)
    dense, small = ([] for _ in range(2))
    for each, states in ((model, dense), (result.model, small)):
        for layer in each.model.layers:
            layer.register_forward_hook(lambda _, __, output, states=states: states.append(output.double()))
        each(windows[:4])
    expected = [((b - a).square().sum() / a.square().sum()).item() for a, b in zip(dense, small, strict=True)]
    assert result.report["layer_errors"] == pytest.approx(expected, rel=1e-4)


def test_a_picture_of_the_errors(model_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["shrink", str(model_dir), "--remove", "0.3", *QUICK, "--picture", "-o"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "errors.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [b["block"] for b in report["blocks"]] == [
        f"model.layers.{i}.{b}" for i in (0, 1) for b in ("attention", "mlp")
    ]
    assert main([*command, str(tmp_path / "none"), "--scorer", "magnitude"]) == 2
    assert "picture shows errors on calibration text: scorer 'magnitude'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_latency_says_how_it_was_measured():
    actual = latency(tiny_model(), 8, batch=2, repeats=3, warmup=1)
    assert (actual["batch"], actual["prompt"], actual["repeats"], actual["dtype"]) == (2, 8, 3, "float32")
    with pytest.raises(BarberError, match="latency prompt 64 is not legal: 1 to 63"):
        latency(tiny_model(), 64)


def test_a_scorer_of_ones_own(model_dir):
    def by_position(given):
        return torch.arange(given.units.count, dtype=torch.float32)

    with SCORERS.temporarily():
        optimum_barber.scorer("by-position")(by_position)
        config = ShrinkConfig(scorer="by-position", remove=0.5)
        result = BarberShrinker(tiny_model()).shrink(config, tiny_windows(), latency=False, quiet=True)
        assert result.structure.layers["model.layers.1"].channels.kept == list(range(24, 48))


def test_a_scorers_answer_is_checked():
    wrong = SCORERS.temporarily({"magnitude": lambda given: torch.zeros(3)})
    message = r"answer for the heads of model.layers.0 is torch.float32 \(3,\): \(2,\)"
    with wrong, pytest.raises(BarberError, match=message):
        BarberShrinker(tiny_model()).shrink(
            ShrinkConfig(scorer="magnitude", remove=0.5), tiny_windows(), latency=False, quiet=True
        )


RECIPE = """\
name: smaller
model: {model}
calibration: {{texts: [pydoc], samples: 4, sequence_length: 32}}
stages:
  - shrink: {{remove: 0.4, round_to: 16, latency: false}}
  - prune: {{producer: wanda, pattern: 2:4}}
  - lora: {{steps: 2, batch_size: 2, rank: 2, logging_steps: 1, saving_steps: 2}}
  - merge
  - quantize: {{method: round-to-nearest, bits: 4, group_size: 16}}
  - evaluate: {{perplexity: [pydoc], windows: 2}}
  - report
output: {output}
"""


def test_structured_then_unstructured_then_quantized(tmp_path, model_dir):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=model_dir, output=tmp_path / "out"), encoding="utf-8")
    result = run_recipe(path, quiet=True)
    assert result.stages["01-shrink"]["channels"] == 32
    assert result.base == str(tmp_path / "out" / "01-shrink" / "model")
    pruned = tmp_path / "out" / "02-prune" / "model"
    assert AutoModelForCausalLM.from_pretrained(pruned).config.intermediate_size == 32
    assert result.stages["02-prune"]["zeros"] == result.stages["05-quantize"]["zeros"] > 0
    assert result.stages["06-evaluate"]["dense"]["perplexity"]["pydoc"]["model"] == str(model_dir)
    assert read_structure(pruned).kept == read_structure(result.base).kept
    steps = [step["name"] for step in read_structure(result.model).steps]
    assert steps == ["prune", "lora-merge", "quantize"]
    again = run_recipe(path, ["prune.pattern=1:4"], quiet=True)
    assert again.reused == ["01-shrink"]
    assert again.base == result.base


def test_a_recipes_faults_are_found_before_any_work(tmp_path, model_dir):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.format(model=model_dir, output=tmp_path / "out").replace("remove: 0.4", "scorer: bipp, remove: 0.4")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BarberError, match="did you mean 'bip'"):
        run_recipe(path, quiet=True)
    path.write_text(text.replace("scorer: bipp, remove: 0.4", "remove: 3"), encoding="utf-8")
    with pytest.raises(BarberError, match="remove 3 is not legal"):
        run_recipe(path, quiet=True)
