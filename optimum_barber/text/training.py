"""Text to token windows for training: most of it to train on, its end only for measuring."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sources import read_texts, split_by_document
from .windows import TokenWindows, consecutive_windows, document_windows, joined_tokens, random_windows

HELD_OUT_WINDOWS = 16


class DocumentRange(Sequence[str]):
    """The documents from `start` to `stop`, each read when it is indexed, none before."""

    def __init__(self, documents: Sequence[str], start: int, stop: int) -> None:
        self.documents, self.start, self.stop = documents, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: Any) -> Any:
        return self.documents[self.start + index]


def training_windows(
    sources: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int, held_out: float, field: str
) -> tuple[TokenWindows, TokenWindows]:
    """Cut random windows to train on, and at most 16 windows of the last `held_out` of the text.

    C4 is sampled by document, and only the sampled documents are read and tokenized; beside other sources it gives its
    share of the samples, at least one. All others are joined by blank lines.

    Args:
        sources: files or registered names.
        tokenizer: of the model.
        samples: windows to train on.
        length: tokens a window.
        seed: decides the windows.
        held_out: share of the text's end, in (0, 1), that is not trained on.
        field: the field of a .jsonl file that holds the text.

    Raises:
        BarberError: a text is missing, or too short.
    """
    sampled, joined = split_by_document(sources)
    shares = len(sources)
    counts = [max((samples + rest) // shares, 1) for rest in reversed(range(shares))]
    parts = []
    for name, count in zip(sampled, counts, strict=False):
        parts.append(document_parts(name, tokenizer, count, length, seed, held_out))
    if joined:
        rest = sum(counts[len(sampled) :])
        parts.append(joined_parts(joined, tokenizer, rest, length, seed, held_out, field))
    train = torch.cat([first for first, _ in parts])
    measured = torch.cat([last[: HELD_OUT_WINDOWS // len(parts)] for _, last in parts])
    return (
        TokenWindows(train, "+".join(sources), "calibration", len(train)),
        TokenWindows(measured, "held out", "evaluation", len(measured)),
    )


def document_parts(
    name: str, tokenizer: Any, samples: int, length: int, seed: int, held_out: float
) -> tuple[Tensor, Tensor]:
    """Cut windows of random documents, and of random ones among the last `held_out`, (windows, length) each."""
    documents, generator = read_texts(name, "calibration"), torch.Generator().manual_seed(seed)
    cut = int(len(documents) * (1 - held_out))
    first, last = DocumentRange(documents, 0, cut), DocumentRange(documents, cut, len(documents))
    train = document_windows(first, tokenizer, samples, length, generator, name)
    return train, document_windows(last, tokenizer, HELD_OUT_WINDOWS, length, generator, name)


def joined_parts(
    names: Sequence[str], tokenizer: Any, samples: int, length: int, seed: int, held_out: float, field: str
) -> tuple[Tensor, Tensor]:
    """Cut windows at random offsets of the joined text, and consecutive ones of its last `held_out`."""
    tokens = joined_tokens(names, tokenizer, field)
    cut = int(len(tokens) * (1 - held_out))
    available = max((len(tokens) - cut) // length, 1)
    last = consecutive_windows(tokens[cut:], length, min(HELD_OUT_WINDOWS, available), "held out")
    return random_windows(tokens[:cut], samples, length, seed, "+".join(names)).tokens, last.tokens
