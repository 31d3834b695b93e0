"""Windows to train on and windows held out: what was drawn, what was read."""

from collections.abc import Sequence

import pytest
import torch

from optimum_barber.base.errors import BarberError
from optimum_barber.text.sources import TEXTS
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.training import training_windows
from optimum_barber.text.windows import consecutive_windows, joined_tokens, random_windows

SETTINGS = {"length": 16, "seed": 1, "held_out": 0.25}


class Shard(Sequence):
    """A hundred thousand documents, written when they are asked for, one at a time."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        assert isinstance(index, int)  # a slice would read many at once
        self.read.append(index)
        return f"{index}: " + "and so on " * 20

    def __iter__(self):
        raise AssertionError("reads all documents")


@pytest.fixture
def shard():
    documents = Shard()
    with TEXTS.temporarily({"c4": lambda split: documents}):
        yield documents


def test_of_a_shard_only_the_drawn_documents_are_read(shard, tokenizer):
    train, held_out = training_windows(["c4"], Encoder(tokenizer), samples=40, **SETTINGS)
    assert (train.tokens.shape, held_out.tokens.shape) == ((40, 16), (16, 16))
    assert len(shard.read) == 56
    assert max(shard.read[:40]) < 75_000 <= min(shard.read[40:])
    again, _ = training_windows(["c4"], Encoder(tokenizer), samples=40, **SETTINGS)
    assert again.fingerprint == train.fingerprint
    other, _ = training_windows(["c4"], Encoder(tokenizer), samples=40, **{**SETTINGS, "seed": 2})
    assert other.fingerprint != train.fingerprint


def test_short_documents_are_passed_over(tokenizer):
    documents = ["short", "a long one " * 9] * 50
    with TEXTS.temporarily({"c4": lambda split: documents}):
        train, _ = training_windows(["c4"], Encoder(tokenizer), samples=20, **SETTINGS)
    assert all("long" in tokenizer.decode(window) for window in train.tokens)
    rare = TEXTS.temporarily({"c4": lambda split: documents[:75] + ["short"] * 25})
    with rare, pytest.raises(BarberError, match="c4 has too few documents of more than 16 tokens"):
        training_windows(["c4"], Encoder(tokenizer), samples=20, **SETTINGS)


def test_other_texts_are_joined_and_their_end_is_held_out(tokenizer):
    train, held_out = training_windows(["pydoc"], Encoder(tokenizer), samples=9, **SETTINGS)
    tokens = joined_tokens(["pydoc"], Encoder(tokenizer))
    cut = int(len(tokens) * 0.75)
    assert torch.equal(train.tokens, random_windows(tokens[:cut], 9, 16, 1, "").tokens)
    assert torch.equal(held_out.tokens, consecutive_windows(tokens[cut:], 16, 16, "").tokens)


def test_a_shard_beside_another_text_gives_its_share(shard, tokenizer):
    train, held_out = training_windows(["pydoc", "c4"], Encoder(tokenizer), samples=9, **SETTINGS)
    assert (train.source, train.tokens.shape, held_out.tokens.shape) == ("pydoc+c4", (9, 16), (16, 16))
    assert sum(index < 75_000 for index in shard.read) == 5


def test_a_folder_of_the_same_name_is_no_shard(shard, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text("a text of one's own, which counts before the name. " * 40)
    train, _ = training_windows(["c4"], Encoder(tokenizer), samples=3, **SETTINGS)
    assert "own" in tokenizer.decode(train.tokens.flatten())
    assert shard.read == []
