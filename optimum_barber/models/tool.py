"""The base of the public verbs that work on a whole causal LM in memory."""

from pathlib import Path
from typing import Any, Self

from .loading import ModelReference, load_model, load_tokenizer, resolve_model
from .wrappers import causal_lm


class PretrainedTool:
    """Base of the classes that work on a whole causal LM in memory; only calibration text needs a tokenizer.

    Without a model they can say what a run would read, and no more.
    """

    def __init__(self, model: Any, tokenizer: Any = None, reference: ModelReference | None = None) -> None:
        self.model: Any = causal_lm(model) if model is not None else None
        self.tokenizer = tokenizer
        self.reference = reference

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: str = "auto") -> Self:
        """Load a hub id, a directory, a GGUF file or `installed:PACKAGE`."""
        reference = resolve_model(str(model))
        return cls(load_model(reference, dtype), load_tokenizer(reference), reference)

    @property
    def name(self) -> str | None:
        """The name of the model; None for one made in memory."""
        if self.reference:
            return self.reference.full_name
        return getattr(self.model.config, "name_or_path", "") or None
