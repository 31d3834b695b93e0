"""Perplexity of a model or an adapter by name."""

from pathlib import Path
from typing import Any

import torch

from ..base.calibration import CalibrationConfig
from ..checkpoints.names import ADAPTER_CONFIG_NAME
from ..models.device import choose_device, working_dtype
from ..models.dtypes import check_dtype
from ..models.loading import ModelReference, load_model, load_tokenizer, resolve_model
from ..text.perplexity import perplexity
from ..text.sources import read_texts
from ..text.tokens import Encoder
from ..text.windows import TokenWindows, consecutive_windows, sequence_length


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
    bos: str = "auto",
) -> dict[str, Any]:
    """Load a model or an adapter and measure its perplexity on the evaluation part of a text.

    Args:
        name: hub id, directory, GGUF file, `installed:PACKAGE`, or the directory of a peft adapter.
        text: a file or a registered name.
        field: of a JSON file, the one that holds the text.
        length: tokens a window; None for 2048, or what the model takes.
        windows: how many, spread over the text; None for all.
        dtype: of the computation; `auto` is float32 on a CPU, else the model's own.
        device: auto, cpu, cuda, ...
        quiet: no progress bar.
        bos: one of `BOS`: windows that begin with the BOS token.
    """
    settings = CalibrationConfig(text_field=field, sequence_length=length, bos=bos)
    chosen = choose_device(device)
    dtype = working_dtype(dtype, chosen)
    model: Any
    if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
        model, reference = load_adapted(Path(name), dtype, chosen)
        whole = model.get_base_model()
    else:
        reference = resolve_model(name)
        whole = model = load_model(reference, dtype, quantized=True).to(chosen)
    tokens = evaluation_windows(text, load_tokenizer(reference), whole, settings, windows)
    return {"model": name, **perplexity(model, tokens, quiet).as_dict()}


def evaluation_windows(
    text: str, tokenizer: Any, model: Any, settings: CalibrationConfig, windows: int | None
) -> TokenWindows:
    """Return consecutive windows of the evaluation part of a text, cut as the settings say; `windows` None for all."""
    encoder = Encoder.of(model, tokenizer, settings)
    room = encoder.room(sequence_length(model.config, settings.sequence_length))
    documents = read_texts(text, "evaluation", settings.text_field, tokenizer)
    return consecutive_windows(encoder.tokens(documents, f"text {text}"), room, windows, text).under(encoder)


def load_adapted(adapter: Path, dtype: str, device: torch.device) -> tuple[Any, ModelReference]:
    """Load an adapter on its model, under the masks that it was trained under; and tell where that model lies."""
    from optimum_barber.integrations.lora.checkpoint import load_adapter

    model = load_adapter(adapter)
    if dtype != "auto":
        check_dtype(model, dtype)
        model = model.to(getattr(torch, dtype))
    return model.to(device), resolve_model(model.get_base_model().config.name_or_path)
