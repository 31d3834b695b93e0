"""Text to token windows: how calibration and evaluation text is cut."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError
from ..models.architectures import positions
from .sources import read_texts, split_by_document
from .window_offsets import window_offsets

DEFAULT_LENGTH = 2048
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class TokenWindows:
    """Token windows and where they come from.

    Attributes:
        tokens: (windows, length) int64.
        source: names or paths of the text.
        split: "calibration" or "evaluation".
        available: how many consecutive windows the text holds.
    """

    tokens: Tensor
    source: str
    split: str
    available: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return what a record says of the windows."""
        samples, length = self.tokens.shape
        settings = {"source": self.source, "samples": samples, "sequence_length": length}
        return {**settings, "fingerprint": self.fingerprint}


def tokenize(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Join documents by blank lines into one run of tokens, (tokens,) int64."""
    ids = tokenizer(SEPARATOR.join(texts), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def sequence_length(config: Any, length: int | None) -> int:
    """Return the window length: `length`, or by default 2048, or the model's positions where they are fewer.

    Raises:
        BarberError: `length` is more than the model has positions.
    """
    most = positions(config) or DEFAULT_LENGTH
    if length is not None and length > most:
        raise BarberError(f"sequence length {length} is more than the model's {most} positions")
    return length or min(DEFAULT_LENGTH, most)


def random_windows(tokens: Tensor, samples: int, length: int, seed: int, source: str) -> TokenWindows:
    """Cut `samples` windows of `length` tokens at seeded random offsets, without overlap as far as the text has room.

    Raises:
        BarberError: the text is too short for one window.
    """
    _check_length(tokens, length, source)
    offsets = window_offsets(len(tokens), samples, length, torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[offset : offset + length] for offset in offsets.tolist()])
    return TokenWindows(windows, source, "calibration", len(tokens) // length)


def consecutive_windows(tokens: Tensor, length: int, windows: int | None, source: str) -> TokenWindows:
    """Cut consecutive windows of `length` tokens; of all T, every floor(T / windows)-th.

    Raises:
        BarberError: the text is too short for one window, or for so many.
    """
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
    documents: Sequence[str], tokenizer: Any, samples: int, length: int, generator: torch.Generator, source: str
) -> Tensor:
    """Cut one window at a uniform offset in each of `samples` random documents longer than a window, as in the papers.

    Raises:
        BarberError: such documents are too rare to be found.
    """
    windows: list[Tensor] = []
    for _ in range(1000 + 1000 * samples):
        if len(windows) == samples:
            break
        document = documents[int(torch.randint(0, len(documents), (1,), generator=generator))]
        tokens = tokenize([document], tokenizer)
        if len(tokens) > length:
            offset = int(torch.randint(0, len(tokens) - length, (1,), generator=generator))
            windows.append(tokens[offset : offset + length])
    if len(windows) < samples:
        raise BarberError(f"text {source} has too few documents of more than {length} tokens: give a shorter length")
    return torch.stack(windows)


def joined_tokens(sources: Sequence[str], tokenizer: Any, field: str = "text") -> Tensor:
    """Join the calibration parts of all `sources` by blank lines into one run of tokens, (tokens,) int64."""
    texts: list[str] = []
    for name in sources:
        texts += read_texts(name, "calibration", field)
    return tokenize(texts, tokenizer)


def calibration_windows(
    sources: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int, field: str = "text"
) -> TokenWindows:
    """Cut calibration windows out of all `sources`; C4 where there are none.

    C4 is sampled by document, and beside other sources gives its share of the samples. All others are joined by blank
    lines and sampled as one text.
    """
    names = list(sources) or ["c4"]
    sampled, joined = split_by_document(names)
    counts = [samples // len(names)] * len(sampled)
    if not joined:
        counts[0] = samples - sum(counts[1:])
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, count in zip(sampled, counts, strict=True):
        if count:
            documents = read_texts(name, "calibration")
            parts.append(document_windows(documents, tokenizer, count, length, generator, name))
    if joined:
        text = joined_tokens(joined, tokenizer, field)
        parts.append(random_windows(text, samples - sum(counts), length, seed, "+".join(joined)).tokens)
    tokens = torch.cat(parts)
    return TokenWindows(tokens, "+".join(names), "calibration", len(tokens))


class CalibrationSettings(Protocol):
    """What decides calibration windows: fields of the settings of every run."""

    @property
    def calibration(self) -> CalibrationConfig: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def windows_for(
    model: Any, tokenizer: Any, config: CalibrationSettings, source: Sequence[str] | Tensor | TokenWindows | None
) -> TokenWindows:
    """Return the calibration windows of a run.

    Args:
        model: a causal LM; windows must fit its positions and vocabulary.
        tokenizer: of the model; None where `source` is tokens.
        config: names the texts, and how windows are cut.
        source: windows, (samples, length) tokens, or texts; None for the texts of `config`.

    Raises:
        BarberError: `source` holds no texts and no tokens for this model, or there is no tokenizer for texts.
    """
    if isinstance(source, TokenWindows):
        return source
    if isinstance(source, Tensor):
        return _token_windows(model, source)
    if isinstance(source, str):
        raise BarberError("calibration is one string: give a list of texts")
    if tokenizer is None:
        raise BarberError("calibration text needs a tokenizer: give one, or token windows (samples, length)")
    settings, seed = config.calibration, config.seed
    length = sequence_length(model.config, settings.sequence_length)
    if source is not None:
        return random_windows(tokenize(list(source), tokenizer), settings.samples, length, seed, "texts")
    return calibration_windows(
        settings.texts, tokenizer, samples=settings.samples, length=length, seed=seed, field=settings.text_field
    )


def _token_windows(model: Any, tokens: Tensor) -> TokenWindows:
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.numel() == 0:
        raise BarberError(f"calibration {tokens.dtype} {tuple(tokens.shape)} is not legal: (samples, length) int64")
    sequence_length(model.config, tokens.shape[1])
    vocabulary = model.get_input_embeddings().num_embeddings
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise BarberError(f"calibration has token {int(tokens.max())}: legal are 0 to {vocabulary - 1}")
    return TokenWindows(tokens.long().cpu(), "tokens", "calibration", len(tokens))
