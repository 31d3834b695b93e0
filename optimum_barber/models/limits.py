"""What a causal LM takes: how many positions, and tokens out of which vocabulary."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx",
)  # fmt: skip


def positions(config: Any) -> int | None:
    """Return how many positions a model has by its configuration; None where that sets no limit."""
    for part in _parts(config):
        for name in POSITIONS:
            count = getattr(part, name, None)
            if count is not None and count > 0:
                return int(count)
    return None


def vocabulary(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for, or a configuration says so; None where neither tells."""
    if hasattr(model, "get_input_embeddings"):
        with suppress(NotImplementedError):  # of a model that has them elsewhere
            rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
            if rows is not None:
                return int(rows)
        return vocabulary(model.config)
    sizes = (getattr(part, "vocab_size", None) for part in _parts(model))
    return next((size for size in sizes if size), None)


def _parts(config: Any) -> Iterable[Any]:
    """Return the configuration of the language model, which several modalities wrap, and the whole."""
    inner = getattr(config, "get_text_config", None)
    return (config,) if inner is None else (inner(decoder=True), config)
