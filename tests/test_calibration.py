"""Text to windows."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber import BarberConfig, BarberRefiner, BarberShrinker, BarberSparsifier, ShrinkConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.prune.refine.settings import RefineConfig
from optimum_barber.text.sources import TEXTS, pydoc_texts, read_texts
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import (
    calibration_windows,
    consecutive_windows,
    disjoint_offsets,
    random_windows,
    sequence_length,
)


class Sized:
    def __init__(self, positions):
        self.max_position_embeddings = positions


def test_pydoc_is_split_four_to_one_without_overlap():
    calibrate, evaluate = pydoc_texts("calibration"), pydoc_texts("evaluation")
    sizes = [sum(map(len, part)) for part in (calibrate, evaluate)]
    assert 0.78 < sizes[0] / sum(sizes) < 0.84
    assert not set(calibrate) & set(evaluate)


def test_windows_start_at_seeded_offsets():
    tokens = torch.arange(1000)
    one, again = (random_windows(tokens, 50, 8, 3, "t") for _ in range(2))
    other = random_windows(tokens, 50, 8, 4, "t")
    assert torch.equal(one.tokens, again.tokens)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert (one.tokens.diff(dim=1) == 1).all()
    assert random_windows(tokens[:8], 2, 8, 0, "t").tokens.tolist() == [list(range(8))] * 2


@given(tokens=st.integers(1, 300), length=st.integers(1, 20), samples=st.integers(1, 60), seed=st.integers(0, 99))
def test_no_two_windows_overlap_where_the_text_has_room(tokens, length, samples, seed):
    if tokens < length:
        return
    result = random_windows(torch.arange(tokens), samples, length, seed, "t").tokens
    assert result.shape == (samples, length)
    assert (result.diff(dim=1) == 1).all()
    fit = tokens // length
    for start in range(0, samples, fit):
        disjoint = result[start : start + fit].flatten().tolist()
        assert len(set(disjoint)) == len(disjoint)


def test_all_disjoint_windows_are_equally_likely():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(disjoint_offsets(7, 2, 3, generator).tolist()) for _ in range(6000))
    legal = {(one, other) for one in range(5) for other in range(5) if abs(one - other) >= 3}
    assert set(drawn) == legal
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in drawn.values())


@given(count=st.integers(10, 500), length=st.integers(2, 10), data=st.data())
def test_evaluation_takes_every_so_manyth_window(count, length, data):
    total = count // length
    windows = data.draw(st.integers(1, total))
    result = consecutive_windows(torch.arange(count), length, windows, "t")
    expected = [[i * (total // windows) * length + j for j in range(length)] for i in range(windows)]
    assert result.tokens.tolist() == expected
    assert result.available == total


def test_the_length_is_capped_by_the_model():
    assert sequence_length(Sized(131072), None) == 2048
    assert sequence_length(Sized(512), None) == 512
    assert sequence_length(Sized(131072), 4096) == 4096
    with pytest.raises(BarberError, match="sequence length 513 is more than the model's 512 positions"):
        sequence_length(Sized(512), 513)


def test_json_lines_give_their_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "1"}\n\n{"text": "two", "body": "2"}\n')
    assert read_texts(str(path), "calibration") == ["one", "two"]
    assert read_texts(str(path), "calibration", "body") == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "is neither a file nor one of c4, ptb, pydoc, wikitext2"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"ab\xff", r"is not UTF-8 \(byte 2\)"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no text field 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2 is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1 has no text field"),
    ],
)
def test_bad_texts_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BarberError, match=message):
        read_texts(str(path), "calibration")


def test_a_text_too_short_for_one_window_is_refused():
    with pytest.raises(BarberError, match="text t is too short: 5 tokens, one window needs 8"):
        random_windows(torch.arange(5), 1, 8, 0, "t")
    with pytest.raises(BarberError, match="windows 3 is not legal: t holds 1 to 2 windows of 8 tokens"):
        consecutive_windows(torch.arange(20), 8, 3, "t")


def test_several_texts_are_joined_by_blank_lines(tmp_path, tokenizer):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(f"text of {path.name}, some words long. " * 9)
    joined = "\n\n".join(path.read_text() for path in paths)
    length = len(tokenizer(joined)["input_ids"])
    windows = calibration_windows([str(p) for p in paths], Encoder(tokenizer), samples=1, length=length, seed=0)
    assert tokenizer.decode(windows.tokens[0]) == joined


def test_line_separators_inside_json_do_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\n', encoding="utf-8")
    assert read_texts(str(path), "calibration") == ["one\u2028two\u0085three"]


def test_a_folder_of_the_same_name_does_not_hide_a_text(tmp_path, monkeypatch):
    (tmp_path / "pydoc").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_texts("pydoc", "calibration") == pydoc_texts("calibration")


def test_a_folder_named_like_a_text_changes_nothing_and_a_file_goes_first(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    documents = [f"document {i} " + "and so on " * 40 for i in range(5)]
    with TEXTS.temporarily({"c4": lambda split: documents}):
        sampled = calibration_windows(["c4"], Encoder(tokenizer), samples=4, length=16, seed=1)
        (tmp_path / "c4").mkdir()
        beside_folder = calibration_windows(["c4"], Encoder(tokenizer), samples=4, length=16, seed=1)
        (tmp_path / "c4").rmdir()
        (tmp_path / "c4").write_text("the words of a file " * 40)
        of_file = calibration_windows(["c4"], Encoder(tokenizer), samples=4, length=16, seed=1)
    assert beside_folder.fingerprint == sampled.fingerprint
    assert all("document" not in tokenizer.decode(window) for window in of_file.tokens)


def test_only_a_file_named_like_a_text_is_an_input_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibration = {"texts": ["c4"]}

    def inputs():
        return [
            BarberSparsifier(None).inputs(BarberConfig(sparsity=0.5, calibration=calibration)),
            BarberShrinker(None).inputs(ShrinkConfig(remove=0.5, calibration=calibration)),
            BarberRefiner(None).inputs(Path("sparse"), RefineConfig(calibration=calibration))[1:],
        ]

    (tmp_path / "c4").mkdir()
    assert inputs() == [[], [], []]
    (tmp_path / "c4").rmdir()
    (tmp_path / "c4").write_text("words of a file")
    assert inputs() == [[Path("c4")]] * 3


def test_c4_is_sampled_by_document(tokenizer):
    documents = ["short"] * 5 + [f"document {i} " + "and so on " * 40 for i in range(5)]
    with TEXTS.temporarily({"c4": lambda split: documents}):
        one, again = (calibration_windows([], Encoder(tokenizer), samples=12, length=16, seed=1) for _ in range(2))
        mixed = calibration_windows(["c4", "pydoc"], Encoder(tokenizer), samples=5, length=16, seed=1)
    assert one.tokens.shape == (12, 16)
    assert one.fingerprint == again.fingerprint
    assert all(any(tokenizer.decode(window) in document for document in documents) for window in one.tokens)
    assert mixed.tokens.shape == (5, 16)
    assert torch.equal(mixed.tokens[:2], one.tokens[:2])
    short = TEXTS.temporarily({"c4": lambda split: ["short"]})
    with short, pytest.raises(BarberError, match="c4 has too few documents of more than 16 tokens"):
        calibration_windows([], Encoder(tokenizer), samples=1, length=16, seed=1)


def test_the_hub_is_asked_as_the_papers_do(monkeypatch):
    asked = []

    def load_dataset(path, **kwargs):
        asked.append((path, kwargs))
        return {"text": ["a"] * 2000, "sentence": ["b"]}

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_texts("c4", "evaluation")) == 1100
    assert read_texts("ptb", "calibration") == ["b"]
    assert len(read_texts("wikitext2", "evaluation")) == 2000
    assert [path for path, _ in asked] == ["allenai/c4", "ptb-text-only/ptb_text_only", "Salesforce/wikitext"]
    assert [kwargs["split"] for _, kwargs in asked] == ["validation", "train", "test"]


def test_a_hub_that_does_not_answer_points_to_pydoc(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BarberError, match=r"'allenai/c4' cannot be had from the hub \(no route\).*'pydoc'"):
        calibration_windows([], Encoder(tokenizer), samples=1, length=4, seed=0)
    assert TEXTS["pydoc"] is pydoc_texts
