"""Texts to tokens that fit a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError
from ..models.limits import vocabulary
from .documents import plain_text

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and what a run asks of its tokens.

    Attributes:
        tokenizer: of the model.
        vocabulary: how many tokens the model has embeddings for; None to check none.
        bos: one of `BOS`: where windows begin with the token for the beginning of a text.
        field: of an object among the documents, the one that holds the text.
    """

    tokenizer: Any
    vocabulary: int | None = None
    bos: str = "auto"
    field: str = "text"

    @classmethod
    def of(cls, model: Any, tokenizer: Any, settings: CalibrationConfig) -> Self:
        """Build the encoder of a model or its configuration under calibration settings."""
        return cls(tokenizer, vocabulary(model), settings.bos, settings.text_field)

    @cached_property
    def first(self) -> int | None:
        """The token that every window begins with; None where windows are cut out of the text as they are.

        Raises:
            BarberError: it is asked for, and the tokenizer has none.
        """
        if self.bos == "always" and self._token is None:
            raise BarberError("bos 'always' is not legal: the tokenizer has no BOS token")
        if self.bos == "always" or (self.bos == "auto" and self.tokenizer("a")["input_ids"][:1] == [self._token]):
            return self._token
        return None

    @property
    def _token(self) -> int | None:
        """The BOS token; tokenizers of other libraries need not know of one."""
        return getattr(self.tokenizer, "bos_token_id", None)

    def room(self, length: int) -> int:
        """Return how many tokens of the text a window of `length` tokens holds.

        Raises:
            BarberError: none, behind the BOS token.
        """
        if self.first is None:
            return length
        if length < 2:
            raise BarberError(f"sequence length {length} is not legal: at least 2, the first is the BOS token")
        return length - 1

    def begun(self, windows: Tensor) -> Tensor:
        """Put the BOS token in front of windows, (windows, room) to (windows, length), where they begin with it."""
        if self.first is None:
            return windows
        return torch.cat([windows.new_full((len(windows), 1), self.first), windows], 1)

    def tokens(self, documents: Iterable[Any], place: str = "text") -> Tensor:
        """Join documents by blank lines into one run of tokens, (tokens,) int64; `place` is what errors call them.

        Raises:
            BarberError: a document is no text, or a token has no embedding.
        """
        texts = []
        for number, document in enumerate(documents, 1):
            text = plain_text(document, self.field, self.tokenizer, f"{place}, item {number}")
            if text is not None:
                texts.append(text)
        tokens = torch.tensor(self.tokenizer(SEPARATOR.join(texts), verbose=False)["input_ids"], dtype=torch.long)
        check_tokens(tokens, self.vocabulary, place, self.tokenizer)
        if self.first is not None or self.bos == "never":
            while len(tokens) and tokens[0] == self._token:
                tokens = tokens[1:]
        return tokens


def check_tokens(tokens: Tensor, vocabulary: int | None, place: str, tokenizer: Any = None) -> None:
    """Refuse tokens without an embedding, in a line that names the first of them."""
    if vocabulary is None:
        return
    for token in tokens[(tokens < 0) | (tokens >= vocabulary)].flatten()[:1].tolist():
        named = hasattr(tokenizer, "convert_ids_to_tokens")
        name = f" ({tokenizer.convert_ids_to_tokens(token)!r})" if named else ""
        raise BarberError(
            f"{place} has token {token}{name}: legal are 0 to {vocabulary - 1}, which the model has embeddings for; "
            "give the model's own tokenizer, or resize the embedding (resize_token_embeddings)"
        )
