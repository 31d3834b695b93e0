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


class Evaluator:
    """A model or an adapter, loaded once, and its perplexity on the evaluation parts of texts.

    Args:
        name: hub id, directory, GGUF file, `installed:PACKAGE`, or the directory of a peft adapter.
        settings: how a text is read and cut: its field, tokens a window (None: 2048, or what the model takes), BOS.
        dtype: of the computation; `auto` is float32 on a CPU, else the model's own.
        device: auto, cpu, cuda, ...
    """

    def __init__(self, name: str, settings: CalibrationConfig, dtype: str = "auto", device: str = "auto") -> None:
        self.name, self.settings = name, settings
        chosen = choose_device(device)
        dtype = working_dtype(dtype, chosen)
        self.model: Any
        if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
            self.model, reference = load_adapted(Path(name), dtype, chosen)
            self.whole = self.model.get_base_model()
        else:
            reference = resolve_model(name)
            self.whole = self.model = load_model(reference, dtype, quantized=True).to(chosen)
        self.tokenizer = load_tokenizer(reference)

    def windows(self, text: str, count: int | None = None) -> TokenWindows:
        """Return so many windows spread over the evaluation part of a file or a registered text; None for all."""
        return evaluation_windows(text, self.tokenizer, self.whole, self.settings, count)

    def perplexity(self, windows: TokenWindows, quiet: bool = False) -> dict[str, Any]:
        """Measure on the windows of one text; raises FailedCheckError if the perplexity is not finite."""
        return {"model": self.name, **perplexity(self.model, windows, quiet).as_dict()}


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
