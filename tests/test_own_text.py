"""Calibration text in a model's own words: the distribution it is drawn from, its documents, its file."""

import json

import pytest
import torch

from optimum_barber import BarberError, OwnTextConfig, own_documents
from optimum_barber.base.devices import random_state
from optimum_barber.cli import main
from optimum_barber.text.own_text.writer import (
    end_tokens,
    generate_rows,
    row_length,
    start_tokens,
    texts_of,
)

from .conftest import tiny_model

QUICK = {"tokens": 96, "length": 24, "batch": 4}
FLAGS = ["--tokens", "96", "--length", "24", "--batch", "4"]


def nucleus(logits, temperature, top_p):
    """What a token may be and how likely, by a loop: the most likely ones until they hold `top_p` together."""
    chances = (logits.double() / temperature).softmax(-1)
    kept, held = torch.zeros_like(chances), 0.0
    for token in chances.argsort(descending=True).tolist():
        if held >= top_p:
            break
        kept[token] = chances[token]
        held += float(chances[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (1.0, 1.0), (0.5, 0.7)])
def test_tokens_are_drawn_from_the_nucleus_as_often_as_it_says(temperature, top_p):
    model, start, count = tiny_model(), torch.tensor([1, 7]), 8000
    model.generation_config.top_k = 2  # a model's own ways of writing are not asked for
    with torch.no_grad():
        expected = nucleus(model(start[None]).logits[0, -1], temperature, top_p)
    config = OwnTextConfig(temperature=temperature, top_p=top_p)
    with random_state(0, model.device):
        result = generate_rows(model, start, count, 1, config).flatten().bincount(minlength=300) / count
    assert not result[expected == 0].any()
    distance = float((result - expected).abs().sum()) / 2
    chance = float((expected * (1 - expected) / count).sqrt().sum()) / 2  # what draws of the same differ by, about
    assert distance < 2 * chance < 0.2
    assert model.generation_config.top_k == 2


def test_each_token_follows_all_before_it():
    model, start = tiny_model(), torch.tensor([1])
    row = generate_rows(model, start, 1, 12, OwnTextConfig(top_p=1e-9))[0]
    tokens = start.tolist()
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert row.tolist() == tokens[1:]


def test_writing_goes_on_behind_the_end_of_a_document(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.generation_config.eos_token_id = int(model(torch.tensor([[1]])).logits[0, -1].argmax())
    rows = generate_rows(model, torch.tensor([1]), 2, 12, OwnTextConfig(top_p=1e-9))
    assert rows.shape == (2, 12) and rows[0, 0] == model.generation_config.eos_token_id
    assert end_tokens(model, tokenizer, None) == {2, model.generation_config.eos_token_id}


def test_documents_are_cut_behind_their_ends_and_hold_no_special_token(tokenizer):
    first, second = (tokenizer(text)["input_ids"] for text in ("a word", "another"))
    assert texts_of([*first, 2, 1, *second], {2}, tokenizer) == ["a word", "another"]
    assert texts_of([2, *first, 2, 2], {2}, tokenizer) == ["a word"]
    assert texts_of([2, 2], {2}, tokenizer) == []


def test_start_is_the_first_special_token_or_a_text(tokenizer):
    assert start_tokens(tokenizer, None).tolist() == [1]
    assert start_tokens(tokenizer, "a word").tolist() == tokenizer("a word")["input_ids"]
    assert end_tokens(tiny_model(), tokenizer, "<s>") == {1, 2}
    assert end_tokens(tiny_model(), tokenizer, "a word") == {2}


def test_the_length_is_what_the_model_has_room_for():
    start, config = torch.tensor([1]), tiny_model().config
    assert [row_length(start, config, asked) for asked in (None, 5, 63)] == [63, 5, 63]
    config.max_position_embeddings = 4096
    assert row_length(start, config, None) == 512


def test_a_seed_decides_the_text_and_leaves_random_numbers_alone(tokenizer):
    model = tiny_model()
    before = torch.random.get_rng_state()
    texts = [own_documents(model, tokenizer, OwnTextConfig(seed=seed, **QUICK), quiet=True) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(len(tokenizer(text)["input_ids"]) for text in texts[0]) > 48  # decoded and read again, of 96


@pytest.mark.parametrize(
    ("tokens", "batch", "sizes"), [(96, 4, [4]), (97, 4, [4, 1]), (1, 16, [1]), (240, 4, [4, 4, 2])]
)
def test_no_more_is_written_than_whole_lengths_ask_for(tokens, batch, sizes, tokenizer, monkeypatch):
    asked = []

    def counted(model, start, count, length, config):
        asked.append(count)
        return torch.full((count, length), 40)

    monkeypatch.setattr("optimum_barber.text.own_text.writer.generate_rows", counted)
    own_documents(tiny_model(), tokenizer, OwnTextConfig(tokens=tokens, length=24, batch=batch), quiet=True)
    assert asked == sizes


def test_the_file_is_calibration_text(model_dir, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    assert main(["own-text", str(model_dir), *FLAGS, "-o", str(path)]) == 0
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"text"} and line["text"] for line in lines)
    assert f"documents           {len(lines):,}, " in capsys.readouterr().out
    flags = ["--sparsity", "0.5", "--calibration", str(path), "--samples", "4", "--sequence-length", "8", "--quiet"]
    assert main(["prune", str(model_dir), *flags, "-o", str(tmp_path / "out")]) == 0
    assert main(["own-text", str(model_dir), *FLAGS, "--seed", "1", "--quiet", "--overwrite", "-o", str(path)]) == 0
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] != lines
    assert not list(tmp_path.glob("*.partial"))


BAD = {
    "not jsonl": (["-o", "own.txt"], "a .jsonl file"),
    "there already": (["-o", "there.jsonl"], "is there already"),
    "no folder": (["-o", "nowhere/own.jsonl"], "no such folder"),
    "no model": (["--model", "nowhere"], "nowhere"),
    "too long": (["--length", "64"], "length 64 is not legal: the model's positions leave 63"),
    "no tokens": (["--tokens", "0"], "tokens"),
    "nothing held": (["--top-p", "0"], "top_p"),
    "no heat": (["--temperature", "0"], "temperature"),
    "dtype": (["--dtype", "float8"], "float8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, model_dir, tmp_path, capsys, monkeypatch):
    flags, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("kept", encoding="utf-8")
    model = flags[1] if flags[0] == "--model" else str(model_dir)
    flags = [] if flags[0] == "--model" else flags
    assert main(["own-text", model, "-o", "own.jsonl", *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "kept"


def test_a_disk_that_fails_leaves_what_was_there(model_dir, tmp_path, capsys, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device")

    (tmp_path / "own.jsonl").write_text("kept", encoding="utf-8")
    monkeypatch.setattr("pathlib.Path.replace", full)
    assert main(["own-text", str(model_dir), *FLAGS, "--overwrite", "-o", str(tmp_path / "own.jsonl")]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("own.jsonl", "kept")]


def test_a_broken_model_and_one_that_is_silent_are_refused(tokenizer):
    model = tiny_model()
    with pytest.raises(BarberError, match="the model writes nothing"):
        silent = OwnTextConfig(top_p=1e-9, **QUICK)
        own_documents(always(model, 2), tokenizer, silent, quiet=True)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(BarberError, match="NaN or Inf"):
        own_documents(model, tokenizer, OwnTextConfig(**QUICK), quiet=True)


def always(model, token):
    """The model, so changed that it likes one token best."""

    def like(_, __, logits):
        return logits.index_fill(-1, torch.tensor([token]), 1e4)

    model.lm_head.register_forward_hook(like)
    return model


def test_a_tokenizer_without_special_tokens_needs_a_start(tokenizer):
    class Plain:
        bos_token_id = eos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": []}

    for start in (None, "x"):
        with pytest.raises(BarberError, match="it must hold a token"):
            start_tokens(Plain(), start)
