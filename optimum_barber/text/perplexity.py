"""Perplexity in the papers' protocol: consecutive windows, mean negative log-likelihood, exponential."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.loading import load_model, load_tokenizer, resolve_model
from ..prune.plan import choose_device, working_dtype
from .sources import read_texts
from .windows import TokenWindows, consecutive_windows, sequence_length, tokenize


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and all that is needed to compare it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over windows of (length - 1) predicted tokens.
        text: name or path of the text.
        split: which part of it.
        sequence_length: tokens a window.
        windows: how many windows were evaluated.
        available: how many consecutive windows the text holds.
        dtype: of the computation.
    """

    perplexity: float
    text: str
    split: str
    sequence_length: int
    windows: int
    available: int
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@torch.no_grad()
def perplexity(model: nn.Module, windows: TokenWindows, quiet: bool = False) -> Perplexity:
    """Perplexity of a causal LM over `windows`; every window is predicted on its own."""
    parameter = next(model.parameters())
    model.eval()
    losses = [
        _loss(model, window.to(parameter.device))
        for window in tqdm(
            windows.tokens.split(1), desc="perplexity", unit="window", disable=quiet or None, leave=False
        )
    ]
    mean = torch.stack(losses).cpu().double().mean().item()
    count, length = windows.tokens.shape
    return Perplexity(
        math.exp(min(mean, 700.0)), windows.source, windows.split, length, count, windows.available,
        str(parameter.dtype).removeprefix("torch."),
    )  # fmt: skip


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
    if (Path(name) / "adapter_config.json").is_file():
        from optimum_barber.integrations.lora.checkpoint import load_adapter

        model = load_adapter(Path(name))
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
        base = model.get_base_model()
        return model.to(device), load_tokenizer(resolve_model(base.config.name_or_path)), base.config
    reference = resolve_model(name)
    model = load_model(reference, dtype, quantized=True).to(device)
    return model, load_tokenizer(reference), model.config


def _loss(model: nn.Module, window: Tensor) -> Tensor:
    logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, window[0, 1:])
