"""Text to token windows: how calibration and evaluation text is cut."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError
from ..models.limits import positions, vocabulary
from .python_input import windows_or_documents
from .sources import read_texts, split_by_document
from .tokens import Encoder, check_tokens

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class TokenWindows:
    """Token windows and where they come from.

    Attributes:
        tokens: (windows, length) int64.
        source: names or paths of the text.
        split: "calibration" or "evaluation".
        available: how many consecutive windows the text holds.
        bos: whether each begins with the BOS token.
    """

    tokens: Tensor
    source: str
    split: str
    available: int
    bos: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def as_dict(self, seed: int | None = None) -> dict[str, Any]:
        """Return what a record says of the windows, and of the seed that decided them."""
        samples, length = self.tokens.shape
        record: dict[str, Any] = {"source": self.source, "samples": samples, "sequence_length": length}
        if seed is not None:
            record["seed"] = seed
        record["fingerprint"] = self.fingerprint
        if self.bos:
            record["bos"] = True
        return record

    def as_record(self, seed: int) -> dict[str, Any]:
        """Return what the record of a checkpoint says of them: `as_dict`, and the part of the text."""
        return {"source": self.source, "split": self.split, **self.as_dict(seed)}

    def under(self, encoder: Encoder) -> "TokenWindows":
        """Return the windows with the BOS token in front, where the encoder wants it there."""
        return replace(self, tokens=encoder.begun(self.tokens), bos=encoder.first is not None)


def sequence_length(config: Any, length: int | None) -> int:
    """Return the window length: `length`, or by default 2048, or the model's positions where they are fewer."""
    most = positions(config)
    if length is not None and most is not None and length > most:
        raise BarberError(f"sequence length {length} is more than the model's {most} positions")
    return length or min(DEFAULT_LENGTH, most or DEFAULT_LENGTH)


def random_windows(tokens: Tensor, samples: int, length: int, seed: int, source: str) -> TokenWindows:
    """Cut `samples` windows of `length` tokens at seeded random offsets, disjoint as far as the text has room."""
    _check_length(tokens, length, source)
    offsets = window_offsets(len(tokens), samples, length, torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[offset : offset + length] for offset in offsets.tolist()])
    return TokenWindows(windows, source, "calibration", len(tokens) // length)


def window_offsets(tokens: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw where `samples` windows of a text of `tokens` tokens start, (samples,) int64, in [0, tokens - length].

    The text has room for F = floor(tokens / length) windows. No two of the first F overlap, nor of the next F.
    """
    room = tokens // length
    parts = []
    for first in range(0, samples, room):
        parts.append(disjoint_offsets(tokens, min(room, samples - first), length, generator))
    return torch.cat(parts)


def disjoint_offsets(tokens: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw where `samples` disjoint windows start, (samples,) int64, in random order; all ways are equally likely.

    Independent starts are such a draw if no two windows happen to overlap. Otherwise the text is taken as a row of
    slots, each a window or a single token between windows, and the windows' slots are drawn.
    """
    starts = torch.randint(0, tokens - length + 1, (samples,), generator=generator)
    if bool((starts.sort().values.diff() >= length).all()):
        return starts
    slots = torch.randperm(tokens - samples * (length - 1), generator=generator)[:samples].sort().values
    starts = slots + torch.arange(samples) * (length - 1)
    return starts[torch.randperm(samples, generator=generator)]


def consecutive_windows(tokens: Tensor, length: int, windows: int | None, source: str) -> TokenWindows:
    """Cut consecutive windows of `length` tokens; of all T, every floor(T / windows)-th."""
    _check_length(tokens, length, source)
    total = len(tokens) // length
    count = total if windows is None else windows
    if not 1 <= count <= total:
        raise BarberError(f"windows {count} is not legal: {source} holds 1 to {total} windows of {length} tokens")
    step = total // count
    chosen = tokens[: total * length].reshape(total, length)[: step * count : step]
    return TokenWindows(chosen.clone(), source, "evaluation", total)


def _check_length(tokens: Tensor, length: int, source: str) -> None:
    if len(tokens) < length:
        raise BarberError(f"text {source} is too short: {len(tokens)} tokens, one window needs {length}")


def document_windows(
    documents: Sequence[Any],
    indices: range,
    encoder: Encoder,
    samples: int,
    length: int,
    generator: torch.Generator,
    source: str,
) -> Tensor:
    """Cut one window at a uniform offset in each of `samples` random documents longer than a window, as in the papers.

    Only documents that are drawn are read, from those at `indices`.
    """
    windows: list[Tensor] = []
    for _ in range(1000 + 1000 * samples):
        document = documents[indices[int(torch.randint(0, len(indices), (1,), generator=generator))]]
        tokens = encoder.tokens([document], f"text {source}")
        if len(tokens) > length:
            offset = int(torch.randint(0, len(tokens) - length, (1,), generator=generator))
            windows.append(tokens[offset : offset + length])
        if len(windows) == samples:
            return torch.stack(windows)
    raise BarberError(f"text {source} has too few documents of more than {length} tokens: give a shorter length")


def joined_tokens(sources: Sequence[str], encoder: Encoder) -> Tensor:
    """Join the calibration parts of all `sources` by blank lines into one run of tokens, (tokens,) int64."""
    texts: list[Any] = []
    for name in sources:
        texts += read_texts(name, "calibration", encoder.field, encoder.tokenizer)
    return encoder.tokens(texts, f"text {'+'.join(sources)}")


def calibration_windows(
    sources: Sequence[str], encoder: Encoder, *, samples: int, length: int, seed: int
) -> TokenWindows:
    """Cut calibration windows out of all `sources`; C4 where there are none.

    C4 is sampled by document, and beside other sources gives its share of the samples. All others are joined by blank
    lines and sampled as one text.
    """
    names, room = list(sources) or ["c4"], encoder.room(length)
    sampled, joined = split_by_document(names)
    counts = [samples // len(names)] * len(sampled)
    if not joined:
        counts[0] = samples - sum(counts[1:])
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, count in zip(sampled, counts, strict=True):
        if count:
            documents = read_texts(name, "calibration")
            every = range(len(documents))
            parts.append(document_windows(documents, every, encoder, count, room, generator, name))
    if joined:
        text = joined_tokens(joined, encoder)
        parts.append(random_windows(text, samples - sum(counts), room, seed, "+".join(joined)).tokens)
    tokens = torch.cat(parts)
    return TokenWindows(tokens, "+".join(names), "calibration", len(tokens)).under(encoder)


Calibration = Sequence[Any] | Tensor | TokenWindows | None  # what callers may give; see `windows_or_documents`


def windows_for(model: Any, tokenizer: Any, settings: CalibrationConfig, seed: int, source: Any = None) -> TokenWindows:
    """Return the calibration windows of a run.

    Args:
        model: a causal LM; windows must fit its positions and vocabulary.
        tokenizer: of the model; None where `source` is tokens.
        settings: names the texts, and how windows are cut.
        seed: decides the windows.
        source: windows, or what `windows_or_documents` reads as tokens or documents; None for the texts of `settings`.
    """
    if isinstance(source, TokenWindows):
        return _fitting(model, source)
    documents = None if source is None else windows_or_documents(source, settings.text_field)
    if isinstance(documents, Tensor):
        return _fitting(model, TokenWindows(documents, "tokens", "calibration", len(documents)))
    if tokenizer is None:
        raise BarberError("calibration text needs a tokenizer: give one, or token windows (samples, length)")
    encoder = Encoder.of(model, tokenizer, settings)
    length = sequence_length(model.config, settings.sequence_length)
    if documents is None:
        return calibration_windows(settings.texts, encoder, samples=settings.samples, length=length, seed=seed)
    tokens = encoder.tokens(documents, "calibration")
    if len(tokens) == 0:
        raise BarberError("calibration holds no text: give a list of texts")
    return random_windows(tokens, settings.samples, encoder.room(length), seed, "texts").under(encoder)


def _fitting(model: Any, windows: TokenWindows) -> TokenWindows:
    """Return windows that fit the model's positions and vocabulary; raise BarberError otherwise."""
    sequence_length(model.config, windows.tokens.shape[1])
    check_tokens(windows.tokens, vocabulary(model), "calibration")
    return windows
