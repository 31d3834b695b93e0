"""What would be pruned in a model, an estimate of memory and work, and what runs it: from its configuration alone."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from .architectures import ARCHITECTURES, Architecture, architecture_of, check_layer, decoder_stack, linears_of
from .calibration import sequence_length
from .errors import BarberError
from .loading import ModelReference, load_config
from .preflight import GIB, LAYER_COPIES, needs_of
from .runtimes import report


def inspect_model(reference: ModelReference, samples: int, length: int | None) -> str:
    """A page about the model: layers, blocks, Linears, memory and work."""
    config = load_config(reference)
    model = skeleton(config)
    architecture = architecture_of(model)
    path, stack = decoder_stack(model, architecture)
    for index, layer in enumerate(stack):
        check_layer(layer, f"{path}.{index}", architecture)
    origin = "table" if config.model_type in ARCHITECTURES else "generic fallback"
    lines = [
        f"model         {reference.name}: {type(model).__name__}, {parameters(model):,} parameters",
        f"architecture  {config.model_type} ({origin})",
        f"layers        {len(stack)} x {type(stack[0]).__name__} in {path}",
    ]
    for block, members in architecture.blocks.items():
        shapes = {n: f"{m.out_features}x{m.in_features}" for n, m in linears_of(stack[0], members).items()}
        lines.append(f"{block:<13} {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
    return "\n".join(lines + estimate(model, stack, architecture, samples, length)) + "\n"


def inspect_targets(reference: ModelReference) -> str:
    """Which runtimes load a checkpoint, and which get faster from it.

    Raises:
        BarberError: it is a GGUF file, or quantized in a way that the table does not know.
    """
    if reference.gguf_file:
        raise BarberError(f"model {reference.name!r} is a GGUF file: targets are known for safetensors checkpoints")
    return f"{reference.name}: {report(reference.directory)}"


def skeleton(config: Any) -> nn.Module:
    """The model without its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config.__dict__.pop("quantization_config", None)
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


def estimate(
    model: nn.Module, stack: nn.ModuleList, architecture: Architecture, samples: int, length: int | None
) -> list[str]:
    """Prunable weights, memory beyond the loaded model or in all, and matrix products of one pass and a default run."""
    config: Any = model.config
    length = sequence_length(config, length)
    blocks = architecture.blocks.values()
    prunable = sum(m.weight.numel() for layer in stack for b in blocks for m in linears_of(layer, b).values())
    dtype = getattr(config, "dtype", None) or torch.float32
    hidden = getattr(config.get_text_config(), "hidden_size", 0)
    needs = needs_of(stack, architecture, hidden, samples, length, parameters(model) * dtype.itemsize, grams=1)
    flops = 2 * prunable * samples * length
    return [
        f"prunable      {prunable:,} weights ({dict(Counter(type(m).__name__ for m in stack))})".replace("'", ""),
        f"memory        {(needs.work + needs.waiting) / GIB:.2f} GiB beyond the model, where it is loaded whole: 4 "
        f"decoder layers in float32 {LAYER_COPIES * needs.layer / GIB:.2f}, activations of {samples * length:,} tokens "
        f"{needs.waiting / GIB:.2f}",
        *needs.lines(),
        f"work          {flops / 1e12:.2f} TFLOP a forward pass over these tokens; a default run takes about 15",
    ]


def parameters(module: nn.Module) -> int:
    """How many parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
