"""What would be pruned in a model, an estimate of memory and work, and what runs it: from its configuration alone."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.errors import BarberError
from ..checkpoints.runtimes import report
from ..models.architectures import ARCHITECTURES, linears_of
from ..models.device import choose_device
from ..models.loading import ModelReference, empty_model, load_config
from ..models.source import ModelSource
from ..text.windows import sequence_length
from .cost.needs import GIB, LAYER_COPIES, needs_of
from .cost.rates import predict
from .cost.timing import table
from .pipeline import Plan
from .producers import PRODUCERS
from .settings import BarberConfig


def inspect_model(reference: ModelReference, samples: int, length: int | None) -> str:
    """A page about the model: layers, blocks, Linears, memory and work."""
    config = load_config(reference)
    config.__dict__.pop("quantization_config", None)
    source = ModelSource(empty_model(config), choose_device("auto"))
    origin = "table" if config.model_type in ARCHITECTURES else "generic fallback"
    lines = [
        f"model         {reference.name}: {type(source.model).__name__}, {parameters(source.model):,} parameters",
        f"architecture  {config.model_type} ({origin})",
        f"layers        {len(source)} x {type(source.stack[0]).__name__} in {source.path}",
    ]
    for block, members in source.architecture.blocks.items():
        shapes = {n: f"{m.out_features}x{m.in_features}" for n, m in linears_of(source.stack[0], members).items()}
        lines.append(f"{block:<13} {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
    return "\n".join(lines + estimate(source, samples, sequence_length(config, length))) + "\n"


def inspect_targets(reference: ModelReference) -> str:
    """Which runtimes load a checkpoint, and which get faster from it.

    Raises:
        BarberError: it is a GGUF file, or quantized in a way that the table does not know.
    """
    if reference.gguf_file:
        raise BarberError(f"model {reference.name!r} is a GGUF file: targets are known for safetensors checkpoints")
    return f"{reference.name}: {report(reference.directory)}"


def estimate(source: ModelSource, samples: int, length: int) -> list[str]:
    """Prunable weights, memory beyond the loaded model or in all, matrix products, and the time of a default run."""
    config: Any = source.model.config
    blocks = source.architecture.blocks.values()
    prunable = sum(m.weight.numel() for layer in source.stack for b in blocks for m in linears_of(layer, b).values())
    dtype = getattr(config, "dtype", None) or torch.float32
    hidden = getattr(config.get_text_config(), "hidden_size", 0)
    written = parameters(source.model) * dtype.itemsize
    needs = needs_of(source.stack, source.architecture, hidden, samples, length, written, grams=1)
    settings = BarberConfig(sparsity=0.5)
    plan = Plan(PRODUCERS["wanda"], settings.sparsity_pattern())
    flops = 2 * prunable * samples * length
    return [
        f"prunable      {prunable:,} weights ({dict(Counter(type(m).__name__ for m in source.stack))})".replace(
            "'", ""
        ),
        f"memory        {(needs.work + needs.waiting) / GIB:.2f} GiB beyond the model, where it is loaded whole: 4 "
        f"decoder layers in float32 {LAYER_COPIES * needs.layer / GIB:.2f}, activations of {samples * length:,} tokens "
        f"{needs.waiting / GIB:.2f}",
        *needs.lines(),
        f"work          {flops / 1e12:.2f} TFLOP a forward pass over these tokens; a default run takes about 10",
        "a default run, Wanda at 50 % and the default rebuild:",
        *table(predict(source, plan, settings, (samples, length), needs.checkpoint, Path(tempfile.gettempdir()))),
    ]


def parameters(module: nn.Module) -> int:
    """How many parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
