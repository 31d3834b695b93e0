"""Text to token windows for training: most of it to train on, its end only for measuring."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .sources import read_texts, split_by_document
from .tokens import Encoder
from .windows import TokenWindows, consecutive_windows, document_windows, joined_tokens, random_windows

HELD_OUT_WINDOWS = 16


def training_windows(
    sources: Sequence[str], encoder: Encoder, *, samples: int, length: int, seed: int, held_out: float
) -> tuple[TokenWindows, TokenWindows]:
    """Cut random windows to train on, and at most 16 windows of the last `held_out` of the text.

    C4 is sampled by document, and only the sampled documents are read and tokenized; beside other sources it gives its
    share of the samples, at least one. All others are joined by blank lines.

    Args:
        sources: files or registered names.
        encoder: of the model.
        samples: windows to train on, of `length` tokens each.
        length: of a window.
        seed: of the windows.
        held_out: share of the text's end, in (0, 1), that is not trained on.
    """
    sampled, joined = split_by_document(sources)
    shares, room = len(sources), encoder.room(length)
    counts = [max((samples + rest) // shares, 1) for rest in reversed(range(shares))]
    parts = []
    for name, count in zip(sampled, counts, strict=False):
        parts.append(_document_parts(name, encoder, count, room, seed, held_out))
    if joined:
        tokens = joined_tokens(joined, encoder)
        cut = int(len(tokens) * (1 - held_out))
        available = max((len(tokens) - cut) // room, 1)
        last = consecutive_windows(tokens[cut:], room, min(HELD_OUT_WINDOWS, available), "held out")
        first = random_windows(tokens[:cut], sum(counts[len(sampled) :]), room, seed, "+".join(joined))
        parts.append((first.tokens, last.tokens))
    train = torch.cat([windows for windows, _ in parts])
    measured = torch.cat([windows[: HELD_OUT_WINDOWS // len(parts)] for _, windows in parts])
    return (
        TokenWindows(train, "+".join(sources), "calibration", len(train)).under(encoder),
        TokenWindows(measured, "held out", "evaluation", len(measured)).under(encoder),
    )


def _document_parts(
    name: str, encoder: Encoder, samples: int, length: int, seed: int, held_out: float
) -> tuple[Tensor, Tensor]:
    """Cut windows of random documents, and of random ones among the last `held_out`, (windows, length) each."""
    documents, generator = read_texts(name, "calibration"), torch.Generator().manual_seed(seed)
    indices = range(len(documents))
    cut = int(len(documents) * (1 - held_out))
    train = document_windows(documents, indices[:cut], encoder, samples, length, generator, name)
    return train, document_windows(documents, indices[cut:], encoder, HELD_OUT_WINDOWS, length, generator, name)
