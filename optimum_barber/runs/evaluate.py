"""Perplexity of a model or an adapter by name."""

from pathlib import Path
from typing import Any

import torch

from ..checkpoints.names import ADAPTER_CONFIG_NAME
from ..models.device import choose_device, working_dtype
from ..models.loading import load_model, load_tokenizer, resolve_model
from ..text.perplexity import perplexity
from ..text.sources import read_texts
from ..text.windows import consecutive_windows, sequence_length, tokenize


def evaluate_model(
    name: str,
    text: str,
    *,
    field: str = "text",
    length: int | None = None,
    windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Load a model or an adapter and measure its perplexity on the evaluation part of a text.

    Args:
        name: hub id, directory, GGUF file, `installed:PACKAGE`, or the directory of a peft adapter.
        text: a file or a registered name.
        field: of a .jsonl file, the one that holds the text.
        length: tokens a window; None for 2048, or what the model takes.
        windows: how many, spread over the text; None for all.
        dtype: of the computation; `auto` is float32 on a CPU, else the model's own.
        device: auto, cpu, cuda, ...
        quiet: no progress bar.
    """
    model, tokenizer, config = _opened(name, dtype, choose_device(device))
    tokens = tokenize(read_texts(text, "evaluation", field), tokenizer)
    chosen = consecutive_windows(tokens, sequence_length(config, length), windows, text)
    return {"model": name, **perplexity(model, chosen, quiet).as_dict()}


def _opened(name: str, dtype: str, device: torch.device) -> tuple[Any, Any, Any]:
    """Model, tokenizer and configuration."""
    dtype = working_dtype(dtype, device)
    if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
        from optimum_barber.integrations.lora.checkpoint import load_adapter

        model = load_adapter(Path(name))
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
        base = model.get_base_model()
        return model.to(device), load_tokenizer(resolve_model(base.config.name_or_path)), base.config
    reference = resolve_model(name)
    model = load_model(reference, dtype, quantized=True).to(device)
    return model, load_tokenizer(reference), model.config
