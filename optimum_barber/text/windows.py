"""Text to token windows: how calibration and evaluation text is cut."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError
from ..base.files import is_there
from ..models.architectures import positions
from .sources import read_texts
from .window_offsets import window_offsets

DEFAULT_LENGTH = 2048
SEPARATOR = "\n\n"
BY_DOCUMENT = frozenset(["c4"])  # too large to be joined; the papers sample them document by document


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


def tokenize(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """The documents joined by blank lines as one run of tokens, (tokens,) int64."""
    ids = tokenizer(SEPARATOR.join(texts), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def sequence_length(config: Any, asked: int | None) -> int:
    """The window length: as asked, or 2048; never more than the model has positions for.

    Raises:
        BarberError: more was asked for than the model can take.
    """
    most = positions(config) or DEFAULT_LENGTH
    if asked is not None and asked > most:
        raise BarberError(f"sequence length {asked} is more than the model's {most} positions")
    return asked or min(DEFAULT_LENGTH, most)


def random_windows(tokens: Tensor, samples: int, length: int, seed: int, source: str) -> TokenWindows:
    """`samples` windows of `length` tokens at seeded random offsets, without overlap as far as the text has room.

    Raises:
        BarberError: the text is too short for one window.
    """
    _check_length(tokens, length, source)
    offsets = window_offsets(len(tokens), samples, length, torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[offset : offset + length] for offset in offsets.tolist()])
    return TokenWindows(windows, source, "calibration", len(tokens) // length)


def consecutive_windows(tokens: Tensor, length: int, windows: int | None, source: str) -> TokenWindows:
    """Consecutive windows of `length` tokens; of all T, every floor(T / windows)-th.

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


def _check_length(tokens: Tensor, length: int, source: str) -> int:
    if len(tokens) < length:
        raise BarberError(f"text {source} is too short: {len(tokens)} tokens, one window needs {length}")
    return len(tokens) - length


def document_windows(
    documents: Sequence[str], tokenizer: Any, samples: int, length: int, generator: torch.Generator, source: str
) -> Tensor:
    """One window at a uniform offset in each of `samples` random documents longer than a window, as the papers have it.

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
    """The calibration parts of all `sources`, joined by blank lines, as one run of tokens, (tokens,) int64."""
    return tokenize([text for name in sources for text in read_texts(name, "calibration", field)], tokenizer)


def calibration_windows(
    sources: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int, field: str = "text"
) -> TokenWindows:
    """Calibration windows out of all `sources`; C4 where none is named.

    C4 is sampled by document, and beside other sources gives its share of the samples; all others are
    joined by blank lines and sampled as one text.
    """
    names = list(sources) or ["c4"]
    joined = [name for name in names if name not in BY_DOCUMENT or is_there(Path(name))]
    sampled = [name for name in names if name not in joined]
    share = samples // len(names)
    shares = [share] * len(sampled) if joined else [samples - share * (len(sampled) - 1), *[share] * (len(sampled) - 1)]
    generator = torch.Generator().manual_seed(seed)
    parts = [
        document_windows(read_texts(name, "calibration"), tokenizer, count, length, generator, name)
        for name, count in zip(sampled, shares, strict=True)
        if count
    ]
    if joined:
        rest = samples - sum(map(len, parts))
        run = joined_tokens(joined, tokenizer, field)
        parts.append(random_windows(run, rest, length, seed, "+".join(joined)).tokens)
    tokens = torch.cat(parts)
    return TokenWindows(tokens, "+".join(names), "calibration", len(tokens))


class CalibrationSettings(Protocol):
    """What decides calibration windows: fields of the settings of every run."""

    @property
    def calibration(self) -> CalibrationConfig: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def windows_for(
    model: Any, tokenizer: Any, config: CalibrationSettings, given: Sequence[str] | Tensor | TokenWindows | None
) -> TokenWindows:
    """The calibration windows of a run: as given, or out of the settings' texts.

    Raises:
        BarberError: what was given are no texts and no windows for this model, or there is no tokenizer for texts.
    """
    if isinstance(given, TokenWindows):
        return given
    if isinstance(given, Tensor):
        if given.ndim != 2 or given.is_floating_point() or given.numel() == 0:
            raise BarberError(f"calibration {given.dtype} {tuple(given.shape)} is not legal: (samples, length) int64")
        sequence_length(model.config, given.shape[1])
        vocabulary = model.get_input_embeddings().num_embeddings
        if not 0 <= int(given.min()) <= int(given.max()) < vocabulary:
            raise BarberError(f"calibration has token {int(given.max())}: legal are 0 to {vocabulary - 1}")
        return TokenWindows(given.long().cpu(), "tokens", "calibration", len(given))
    if isinstance(given, str):
        raise BarberError("calibration is one string: give a list of texts")
    if tokenizer is None:
        raise BarberError("calibration text needs a tokenizer: give one, or token windows (samples, length)")
    settings, seed = config.calibration, config.seed
    length = sequence_length(model.config, settings.sequence_length)
    if given is not None:
        return random_windows(tokenize(list(given), tokenizer), settings.samples, length, seed, "texts")
    return calibration_windows(
        settings.texts, tokenizer, samples=settings.samples, length=length, seed=seed, field=settings.text_field
    )
