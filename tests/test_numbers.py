"""Numbers beyond a dtype: an error with status 1 that says so, and JSON that any reader takes."""

import json
import math

import pytest
import torch

from optimum_barber import BarberConfig, BarberSparsifier, TokenWindows, perplexity
from optimum_barber.base.errors import FailedCheckError
from optimum_barber.base.files import as_json, write_json
from optimum_barber.cli import main

from .conftest import tiny_model, tiny_windows


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def strict(text):
    return json.loads(text, parse_constant=refuse)


def test_json_holds_null_for_what_is_not_finite(tmp_path):
    content = {"a": [1.5, math.nan, (math.inf, "NaN")], "b": {"c": -math.inf, "d": None, "e": True}}
    expected = {"a": [1.5, None, [None, "NaN"]], "b": {"c": None, "d": None, "e": True}}
    write_json(tmp_path / "x.json", content)
    assert strict((tmp_path / "x.json").read_text()) == expected == strict(as_json(content, None))
    assert as_json({"b": 1, "a": [1e300]}) == json.dumps({"b": 1, "a": [1e300]}, indent=2)


@pytest.fixture(scope="module")
def loud(tmp_path_factory, tokenizer):
    """A model whose logits are beyond float32."""
    directory = tmp_path_factory.mktemp("loud")
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight.data.fill_(3e38)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_eval_measures_the_others_writes_null_and_ends_with_1(loud, model_dir, text_file, tmp_path, capsys):
    flags = ["--perplexity", text_file, "--sequence-length", 32, "--windows", 2, "--quiet", "--json", tmp_path / "x"]
    assert main(["eval", *map(str, [loud, model_dir, *flags])]) == 1
    said = capsys.readouterr()
    rows = strict((tmp_path / "x").read_text())
    assert [row["perplexity"] is None for row in rows] == [True, False]
    assert f"{loud}: perplexity on {text_file} is not finite: window 0 of 2 gives NaN or Inf in float32" in said.err
    assert said.err.count("\n") == 1
    assert str(model_dir) in said.out and str(loud) not in said.out


def test_a_perplexity_that_is_not_finite_is_an_error():
    model, windows = tiny_model(), TokenWindows(tiny_windows(), "tokens", "evaluation", 4)
    model.lm_head.weight.data[int(windows.tokens[2, 3])] = torch.inf
    with pytest.raises(FailedCheckError, match="on tokens is not finite: window"):
        perplexity(model, windows, quiet=True)


def test_a_task_without_numbers_is_an_error(loud, text_file, capsys):
    pytest.importorskip("lm_eval")
    from optimum_barber.runs.tasks.evaluate import evaluate_tasks

    with pytest.raises(FailedCheckError, match="model gives NaN or Inf in float32: no task has a result"):
        evaluate_tasks(str(loud), [f"rolling:{text_file}"], limit=1, quiet=True)


@pytest.mark.parametrize("rebuild", ["none", "barber+swaps"])
def test_a_block_beyond_float32_ends_the_run(tmp_path, rebuild):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data *= 1e22
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e15
    config = BarberConfig(sparsity=0.5, rebuild=rebuild)
    with pytest.raises(FailedCheckError, match=r"model.layers.1.mlp has the error .* beyond float32") as failed:
        BarberSparsifier(model).sparsify(config, tiny_windows(), tmp_path / "out", quiet=True)
    assert "\n" not in str(failed.value) and failed.value.status == 1
    assert list(tmp_path.iterdir()) == []
