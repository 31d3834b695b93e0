"""Tasks out of local files, against sums by hand; any checkpoint evaluated from Python."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig

from optimum_barber.base.errors import BarberError, MissingExtraError
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.record import read_record
from optimum_barber.integrations.lm_eval.checkpoint import checkpoint_for
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.runs.tasks import evaluate as evaluation
from optimum_barber.runs.tasks.evaluate import evaluate_tasks
from optimum_barber.runs.tasks.offline import offline_tasks

from .conftest import tiny_windows

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

ROWS = [
    {"question": "What is assigned?", "choices": ["a target", "no", "the expression list"], "gold": 2},
    {"question": "What is a list?", "choices": ["a mutable sequence", "a loop"], "gold": 0, "more": "is left out"},
    {"question": "Which word ends a block?", "choices": ["def", "indentation", "pass", "is"], "gold": 1},
]
DOCUMENTS = ["A list is a sequence.", "The assert statement\nis a way to check."]


@pytest.fixture
def tasks(tmp_path):
    """A file of questions and one of documents."""
    choice, rolling = tmp_path / "questions.jsonl", tmp_path / "documents.jsonl"
    choice.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    rolling.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, " "]))
    return [f"choice:{choice}", f"rolling:{rolling}"]


def log_likelihood(model, tokenizer, context, continuation):
    """Of every token of `continuation`, one forward pass each."""
    total = 0.0
    ids, following = list(context), tokenizer(continuation)["input_ids"]
    for token in following:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


def test_local_tasks_are_the_sums_by_hand(model_dir, tasks):
    reference = resolve_model(str(model_dir))
    model, tokenizer = load_model(reference), load_tokenizer(reference)
    right = right_normed = 0
    for row in ROWS:
        context = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        sums = [log_likelihood(model, tokenizer, context, f" {choice}") for choice in row["choices"]]
        normed = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
        right += sums.index(max(sums)) == row["gold"]
        right_normed += normed.index(max(normed)) == row["gold"]
    total = sum(log_likelihood(model, tokenizer, [tokenizer.bos_token_id], text) for text in DOCUMENTS)
    result = evaluate_tasks(model_dir, tasks)
    assert result["sparsity"] is None
    choice, rolling = result["results"]["questions"], result["results"]["documents"]
    assert (choice["acc"], choice["acc_norm"]) == pytest.approx((right / 3, right_normed / 3))
    share = right / 3
    assert choice["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 2))
    assert (choice["rows"], rolling["rows"]) == (3, 2)
    words, size = sum(len(text.split()) for text in DOCUMENTS), sum(len(text.encode()) for text in DOCUMENTS)
    assert rolling["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert rolling["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert rolling["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    assert "word_perplexity_stderr" not in rolling


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("choice", '{"question": "q", "choices": ["a", "b"], "gold": 0}\nno json\n', "line 2: Invalid JSON"),
        ("choice", '\n{"question": "q", "choices": ["a", "b"]}\n', "line 2: gold: Field required"),
        ("choice", '{"question": "q", "choices": ["a"], "gold": 0}', "line 1: choices: List should have at least 2"),
        ("choice", '{"question": "q", "choices": ["a", ""], "gold": 0}', "line 1: choices.1: String should have"),
        ("choice", '{"question": "q", "choices": ["a", "b"], "gold": 2}', "line 1: gold 2 is none of the 2 choices"),
        ("choice", '{"question": "q", "choices": ["a", "b"], "gold": true}', "line 1: gold: Input should be a valid"),
        ("choice", "[]", "line 1: "),
        ("choice", "\n\n", "is empty"),
        ("rolling", '{"text": "a"}\n{"txt": "b"}', "line 2 has no text field 'text'"),
        ("rolling", "", "is empty"),
        ("other", "", "is not legal: choice:FILE, rolling:FILE, or a name"),
    ],
)
def test_bad_task_files_are_one_line(tmp_path, kind, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(BarberError) as caught:
        offline_tasks([f"{kind}:{path}"], tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tasks_that_cannot_be_told_apart_or_found(tasks, tmp_path):
    (tmp_path / "deep").mkdir()
    shutil.copy(tmp_path / "questions.jsonl", tmp_path / "deep")
    with pytest.raises(BarberError, match="two tasks are called 'questions'"):
        offline_tasks([tasks[0], f"choice:{tmp_path}/deep/questions.jsonl"], tmp_path)
    with pytest.raises(BarberError, match="there is no file '/none'"):
        offline_tasks(["rolling:/none"], tmp_path)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    with pytest.raises(BarberError, match="not UTF-8"):
        offline_tasks([f"choice:{tmp_path}/bytes.jsonl"], tmp_path)


def test_questions_are_asked_as_arc_asks_them(tasks, tmp_path):
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load(offline_tasks(tasks, tmp_path))["tasks"]["questions"]
    task.build_all_requests()
    asked = [request.args for request in task.instances]
    assert asked == [
        (f"Question: {row['question']}\nAnswer:", f" {choice}") for row in ROWS for choice in row["choices"]
    ]
    assert len(list(tmp_path.rglob("*.arrow"))) == 2  # nothing outside the folder that goes with the tasks


def test_adapters_are_evaluated_under_their_masks(model_dir, tasks, tmp_path, monkeypatch):
    from optimum_barber.integrations.lora.masked_lora import masked_lora

    monkeypatch.setenv("OPTIMUM_BARBER_CACHE", str(tmp_path / "cache"))
    settings = {"producer": "magnitude", "sparsity": 0.5, "rebuild": "none"}
    pruned = checkpoint_for(model_dir, settings, "cpu", ())
    opened = PrunedModel.load(pruned)
    adapted = masked_lora(opened.model, opened.masks, LoraConfig(r=2, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    opened.tokenizer.save_pretrained(tmp_path / "merged")
    of_adapter, of_merged = (evaluate_tasks(tmp_path / name, tasks[1:], quiet=True) for name in ("adapter", "merged"))
    assert of_adapter["results"]["documents"] == pytest.approx(of_merged["results"]["documents"], rel=1e-4)
    before = evaluate_tasks(pruned, tasks[1:])["results"]["documents"]["byte_perplexity"]
    assert abs(before - of_merged["results"]["documents"]["byte_perplexity"]) > 1e-3 * before
    assert checkpoint_for(tmp_path / "adapter", {}, None, ()) == tmp_path / "adapter"
    assert of_adapter["sparsity"]["mask_fingerprint"] == read_record(pruned).fingerprint


def test_quantized_checkpoints_are_evaluated_with_their_weights(model_dir, tasks, tmp_path):
    from optimum_barber.integrations.quantization.quantize import quantize_model
    from optimum_barber.integrations.quantization.settings import QuantizeSettings
    from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
    from optimum_barber.text.windows import TokenWindows

    windows = TokenWindows(tiny_windows(2), "tokens", "calibration", 2)
    quantize_model(model_dir, tmp_path / "q", QuantizeSettings(bits=4, group_size=16), windows, quiet=True)
    reference = resolve_model(str(tmp_path / "q"))
    load_model(reference, "float32", quantized=True).save_pretrained(tmp_path / "plain")
    load_tokenizer(reference).save_pretrained(tmp_path / "plain")
    result, expected = (evaluate_tasks(tmp_path / name, tasks[1:], quiet=True) for name in ("q", "plain"))
    assert result["results"] == expected["results"]
    assert result["results"] != evaluate_tasks(model_dir, tasks[1:], quiet=True)["results"]


def test_limit_and_quiet(model_dir, tasks, capfd):
    result = evaluate_tasks(model_dir, tasks, limit=2, quiet=True)["results"]
    assert (result["questions"]["rows"], result["documents"]["rows"]) == (2, 2)
    quiet = capfd.readouterr()
    assert quiet.out == ""
    assert not any(bar in quiet.err for bar in ("loglikelihood", "Tokenizing", "Generating"))
    evaluate_tasks(model_dir, tasks[:1])
    assert "Running loglikelihood requests" in capfd.readouterr().err


def test_what_cannot_be_evaluated_is_one_line(model_dir, tasks, monkeypatch):
    import lm_eval.tasks

    class Index(lm_eval.tasks.TaskManager):
        def __init__(self, include_defaults):
            super().__init__(include_defaults=False)

    with monkeypatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", Index)
        with pytest.raises(BarberError, match="task 'arc_esy' is unknown to lm-eval"):
            evaluate_tasks(model_dir, ["arc_esy"])
    with pytest.raises(BarberError, match="unknown dtype 'half'"):
        evaluate_tasks(model_dir, tasks, dtype="half")
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'optimum-barber\[eval\]'"):
        evaluate_tasks(model_dir, tasks)
