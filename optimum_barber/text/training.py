"""Text to token windows for training: most of it to train on, its end only to be measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import is_there
from .sources import read_texts
from .windows import (
    BY_DOCUMENT,
    TokenWindows,
    consecutive_windows,
    document_windows,
    joined_tokens,
    random_windows,
)

HELD_OUT_WINDOWS = 16


class Part:
    """A stretch of a sequence of documents; none is read before it is asked for.

    Args:
        documents: all of them.
        start: position of the first one.
        stop: position behind the last one.
    """

    def __init__(self, documents: Sequence[str], start: int, stop: int) -> None:
        self.documents, self.start, self.stop = documents, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> str:
        return self.documents[self.start + index]


def training_windows(
    sources: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int, held_out: float, field: str
) -> tuple[TokenWindows, TokenWindows]:
    """Random windows to train on, and at most 16 windows of the last `held_out` of the text.

    C4 is sampled by document, and only the documents that are drawn are read and tokenized; beside other sources it
    gives its share of the samples, at least one. All others are joined by blank lines.

    Args:
        sources: files or registered names.
        tokenizer: of the model.
        samples: windows to train on.
        length: tokens a window.
        seed: decides the windows.
        held_out: share of the text's end, in (0, 1), out of which no window is trained on.
        field: of a .jsonl file, the one that holds the text.

    Raises:
        BarberError: a text is missing, or too short.
    """
    sampled = [name for name in sources if name in BY_DOCUMENT and not is_there(Path(name))]
    joined = [name for name in sources if name not in sampled]
    counts = [max((samples + position) // len(sources), 1) for position in reversed(range(len(sources)))]
    parts = [
        document_parts(name, tokenizer, count, length, seed, held_out)
        for name, count in zip(sampled, counts, strict=False)
    ]
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
    """Windows of random documents, and of random ones among the last `held_out` of them, (windows, length) each."""
    documents, generator = read_texts(name, "calibration"), torch.Generator().manual_seed(seed)
    cut = int(len(documents) * (1 - held_out))
    parts = (Part(documents, 0, cut), samples), (Part(documents, cut, len(documents)), HELD_OUT_WINDOWS)
    first, last = (
        document_windows(part, tokenizer, count, length, generator, name)  # type: ignore[arg-type]
        for part, count in parts
    )
    return first, last


def joined_parts(
    names: Sequence[str], tokenizer: Any, samples: int, length: int, seed: int, held_out: float, field: str
) -> tuple[Tensor, Tensor]:
    """Windows at random offsets of the joined text, and consecutive ones of its last `held_out`."""
    tokens = joined_tokens(names, tokenizer, field)
    cut = int(len(tokens) * (1 - held_out))
    available = max((len(tokens) - cut) // length, 1)
    last = consecutive_windows(tokens[cut:], length, min(HELD_OUT_WINDOWS, available), "held out")
    return random_windows(tokens[:cut], samples, length, seed, "+".join(names)).tokens, last.tokens
