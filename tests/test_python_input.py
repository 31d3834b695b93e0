"""Calibration from Python: what callers hold is read as what it is, or refused in one line."""

from collections import OrderedDict
from itertools import count, repeat
from pathlib import Path

import numpy as np
import pytest
import torch

from optimum_barber import (
    BarberConfig,
    BarberRefiner,
    BarberShrinker,
    BarberSparsifier,
    CalibrationConfig,
    ShrinkConfig,
)
from optimum_barber.base.errors import BarberError
from optimum_barber.prune.refine.settings import RefineConfig
from optimum_barber.text import python_input
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.windows import TokenWindows, windows_for

from .conftest import tiny_model, tiny_windows

DOCUMENTS = ["one text, " * 20, "another text, " * 20]
ROWS = tiny_windows(3, 8)
SETTINGS = CalibrationConfig(samples=3, sequence_length=8)


@pytest.fixture(scope="module")
def actual(tokenizer):
    """The windows that a source gives, as a function."""
    model = tiny_model()

    def of(source, **settings):
        return windows_for(model, tokenizer, SETTINGS.model_copy(update=settings), 0, source).tokens

    return of


def data_set(**columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def frame(**columns):
    return pytest.importorskip("pandas").DataFrame(columns)


TEXTS = {
    "tuple": lambda: tuple(DOCUMENTS),
    "generator": lambda: (text for text in DOCUMENTS),
    "with nulls": lambda: [None, DOCUMENTS[0], float("nan"), DOCUMENTS[1]],
    "array of objects": lambda: np.array([*DOCUMENTS, None], dtype=object),
    "array of strings": lambda: np.array(DOCUMENTS),
    "objects": lambda: [{"text": text, "id": 1} for text in DOCUMENTS],
    "data set": lambda: data_set(text=[*DOCUMENTS, None], other=["x"] * 3),
    "its column": lambda: data_set(text=DOCUMENTS)["text"],
    "frame": lambda: frame(text=[*DOCUMENTS, None], other=["x"] * 3),
    "series": lambda: frame(text=[DOCUMENTS[0], float("nan"), DOCUMENTS[1]])["text"],
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_are_read_in_every_container(case, actual):
    assert torch.equal(actual(TEXTS[case]()), actual(list(DOCUMENTS)))


TOKENS = {
    "int32": lambda: ROWS.int(),
    "uint8": lambda: ROWS.clamp(max=255).byte(),
    "array": lambda: ROWS.numpy(),
    "array of uint16": lambda: ROWS.numpy().astype(np.uint16),
    "big-endian array": lambda: ROWS.numpy().astype(">i4"),
    "lists": lambda: ROWS.tolist(),
    "tuples": lambda: tuple(map(tuple, ROWS.tolist())),
    "rows of tensors": lambda: list(ROWS),
    "rows of arrays": lambda: list(ROWS.numpy()),
    "batches of one": lambda: list(ROWS.split(1)),
    "array of lists": lambda: np.array([*ROWS.tolist(), None], dtype=object)[:3],
    "generator": lambda: (row for row in ROWS.tolist()),
    "tokenized data set": lambda: data_set(text=ROWS.tolist(), attention_mask=[[1] * 8] * 3),
}


@pytest.mark.parametrize("case", TOKENS)
def test_token_ids_are_windows(case, actual):
    expected = ROWS.clamp(max=255) if case == "uint8" else ROWS
    tokens = actual(TOKENS[case]())
    assert tokens.dtype == torch.int64 and torch.equal(tokens, expected)


def test_another_field_holds_what_it_is_told(actual):
    rows = data_set(input_ids=ROWS.tolist(), attention_mask=[[1] * 8] * 3)
    assert torch.equal(actual(rows, text_field="input_ids"), ROWS)
    assert torch.equal(actual([{"input_ids": row} for row in ROWS.tolist()], text_field="input_ids"), ROWS)
    texts = data_set(body=DOCUMENTS)
    assert torch.equal(actual(texts, text_field="body"), actual(DOCUMENTS))


def stream():
    return data_set(text=DOCUMENTS).to_iterable_dataset()


def splits(**parts):
    return pytest.importorskip("datasets").DatasetDict(parts)


BAD = {
    "text": (lambda: "pydoc", "calibration is one string or file, str: give a list of texts"),
    "bytes": (lambda: b"text", "one string or file, bytes"),
    "path": (lambda: Path("text.txt"), "one string or file, PosixPath"),
    "set": (lambda: set(DOCUMENTS), "calibration is a set, neither list nor windows"),
    "mapping": (lambda: OrderedDict(input_ids=ROWS), "calibration is a OrderedDict"),
    "number": (lambda: 5, "calibration int is not legal: give a list of texts"),
    "nothing": (lambda: [], "calibration holds no text"),
    "nulls": (lambda: [None, ""], "calibration holds no text"),
    "one row": (lambda: [1, 2, 3], "calibration, item 1 has no text field 'text'"),
    "bytes among texts": (lambda: [DOCUMENTS[0], b"x"], "calibration, item 2 has no text field 'text'.*not bytes"),
    "rows of two lengths": (lambda: [[1, 2], [1, 2, 3]], "calibration, item 2 holds 3 token ids, item 1 2"),
    "rows and texts": (lambda: [[1, 2], "x"], "calibration, item 2 holds no token ids"),
    "tokens, not ids": (lambda: [["a", "b"]], "item 1 has no text field"),
    "too large": (lambda: [[1, 2**70]], "a token id beyond int64"),
    "float rows": (lambda: [[1.0, 2.0]], "item 1 has no text field"),
    "float array": (lambda: ROWS.float().numpy(), r"calibration torch.float32 \(3, 8\) is not legal"),
    "bool": (lambda: ROWS > 5, r"calibration torch.bool \(3, 8\) is not legal: \(samples, length\) int64"),
    "complex": (lambda: ROWS * 1j, "calibration torch.complex64"),
    "one dimension": (lambda: ROWS[0], r"calibration torch.int64 \(8,\) is not legal"),
    "one dimension, array": (lambda: ROWS[0].numpy(), r"calibration torch.int64 \(8,\) is not legal"),
    "sparse": (lambda: ROWS.to_sparse(), r"\(3, 8\) is not legal"),
    "no data": (lambda: ROWS.to("meta"), "calibration torch.int64"),
    "empty": (lambda: ROWS[:0], r"\(0, 8\) is not legal"),
    "negative": (lambda: -ROWS, "calibration has token -[0-9]+: legal are 0 to 299"),
    "beyond": (lambda: ROWS + 300, "legal are 0 to 299.*give the model's own tokenizer, or resize the embedding"),
    "beyond, windows": (lambda: TokenWindows(ROWS + 300, "mine", "calibration", 3), "legal are 0 to 299"),
    "too long": (lambda: tiny_windows(1, 65), "sequence length 65 is more than the model's 64 positions"),
    "no such column": (lambda: data_set(body=["x"]), "no column 'text' .*: it has body"),
    "no such column, frame": (lambda: frame(body=["x"]), "no column 'text'"),
    "several splits": (
        lambda: pytest.importorskip("datasets").DatasetDict(train=data_set(text=["x"])),
        "a DatasetDict",
    ),
    "stream": (stream, r"stream without a known end: give list\(stream.take\(1000\)\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_neither_is_refused_in_one_line(case, actual):
    source, message = BAD[case]
    with pytest.raises(BarberError, match=message) as caught:
        actual(source())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [repeat("text"), map(str, count())], ids=["repeat", "map"])
def test_an_iterator_without_an_end_is_refused(source, actual, monkeypatch):
    monkeypatch.setattr(python_input, "MOST", 1000)
    with pytest.raises(BarberError, match="calibration yields more than 1,000 items"):
        actual(source)


def test_every_verb_reads_them_alike(tokenizer, model_dir):
    verbs = (
        lambda source: BarberSparsifier(tiny_model(), tokenizer).sparsify(BarberConfig(sparsity=0.5), source),
        lambda source: BarberShrinker(tiny_model(), tokenizer).shrink(ShrinkConfig(remove=0.2), source),
    )
    for verb in verbs:
        with pytest.raises(BarberError, match="calibration, item 2 has no text field"):
            verb(["text", b"x"])
    result = BarberSparsifier(tiny_model(), tokenizer).sparsify(
        BarberConfig(sparsity=0.5, rebuild="none", calibration=SETTINGS), [None, *DOCUMENTS], quiet=True
    )
    assert result.sparsity_config.calibration["source"] == "texts"
    assert RefineConfig(calibration=("pydoc",)).calibration.texts == ["pydoc"]
    assert BarberRefiner(tiny_model(), tokenizer).tokenizer is tokenizer


def test_perplexity_takes_token_ids_too(actual):
    model = tiny_model()
    expected = perplexity(model, TokenWindows(ROWS, "tokens", "calibration", 3), quiet=True)
    assert perplexity(model, ROWS.numpy(), quiet=True) == expected == perplexity(model, ROWS.tolist(), quiet=True)
    with pytest.raises(BarberError, match="needs a tokenizer"):
        perplexity(model, DOCUMENTS)
