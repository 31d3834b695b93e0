"""What would be pruned in a model, an estimate of memory and time, and what runs it: from its configuration alone."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..base.errors import BarberError
from ..checkpoints.runtimes import report
from ..models.architectures import ARCHITECTURES
from ..models.device import choose_device
from ..models.linears import dense_rest, linear_shapes, spelled_shares
from ..models.loading import ModelReference, empty_model, load_config
from ..models.source import ModelSource
from ..text.windows import sequence_length
from .cost.forecast import forecast
from .cost.needs import GIB, LAYER_COPIES, needs_of
from .settings import BarberConfig


def inspect_model(reference: ModelReference, samples: int, length: int | None) -> str:
    """Describe the model on one page: layers, blocks, Linears, memory and time."""
    config = load_config(reference)
    config.__dict__.pop("quantization_config", None)
    source = ModelSource(empty_model(config), choose_device("auto"))
    origin = "table" if config.model_type in ARCHITECTURES else "by a look at its layers"
    lines = [
        f"model         {reference.name}: {type(source.model).__name__}, {_parameters(source.model):,} parameters",
        f"architecture  {config.model_type} ({origin})",
        f"layers        {len(source)} x {type(source.stack[0]).__name__} in {source.path}",
    ]
    lines += _layers(source)
    rest = dense_rest(source)
    if rest:
        lines.append(f"dense         {spelled_shares(rest)} of the layers' weights")
    lines += _estimate(source, samples, sequence_length(config, length))
    return "\n".join(lines) + "\n"


def _layers(source: ModelSource) -> list[str]:
    """Describe the blocks of each kind of layer, with the numbers of the layers where there are several kinds."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(source)):
        blocks = []
        layer = source.structure(index)
        for block, matrices in layer.matrices.items():
            linears = ", ".join(_grouped(matrices.linears, index))
            blocks.append(f"{block.removeprefix(f'{layer.name}.'):<13} {linears}")
        kinds.setdefault(tuple(blocks), []).append(index)
    lines: list[str] = []
    for kind, indices in kinds.items():
        if len(kinds) > 1:
            lines.append(f"of layers     {', '.join(map(str, indices))}")
        lines += kind
    return lines


def _grouped(linears: Mapping[str, nn.Linear], layer: int) -> list[str]:
    """Spell names within the layer and shapes; those that differ in a number alone, such as experts, as one."""
    numbers: dict[str, list[int]] = {}
    for name, linear in linears.items():
        short = re.sub(rf"^.*?\.{layer}\.", "", name, count=1)
        number = re.search(r"(?<=\.)\d+(?=\.|$)", short)
        if number:
            short = f"{short[: number.start()]}{{}}{short[number.end() :]}"
        numbers.setdefault(f"{short} {linear.out_features}x{linear.in_features}", []).extend(
            [int(number[0])] if number else []
        )
    spelled = []
    for text, indices in numbers.items():
        whole = indices == list(range(len(indices))) and len(indices) > 1
        among = f"{{0..{len(indices) - 1}}}" if whole else "{" + ",".join(map(str, indices)) + "}"
        spelled.append(text.replace("{}", among))
    return spelled


def inspect_targets(reference: ModelReference) -> str:
    """Say which runtimes load a checkpoint and are faster; raises BarberError for GGUF or an unknown quantization."""
    if reference.gguf_file:
        raise BarberError(f"model {reference.name!r} is a GGUF file: targets are known for safetensors checkpoints")
    return f"{reference.name}: {report(reference.directory)}"


def _estimate(source: ModelSource, samples: int, length: int) -> list[str]:
    config: Any = source.model.config
    prunable = sum(rows * columns for rows, columns in linear_shapes(source).values())
    layers = Counter(type(layer).__name__ for layer in source.stack)
    counts = ", ".join(f"{name}: {count}" for name, count in layers.items())
    dtype = getattr(config, "dtype", None) or torch.float32
    hidden = getattr(config.get_text_config(), "hidden_size", 0)
    written = _parameters(source.model) * dtype.itemsize
    needs = needs_of(source, hidden, samples, length, written, grams=1)
    settings = BarberConfig(sparsity=0.5)
    flops = 2 * prunable * samples * length
    return [
        f"prunable      {prunable:,} weights ({{{counts}}})",
        f"memory        {(needs.layer_work + needs.activation_bytes) / GIB:.2f} GiB beyond the model, where it is "
        f"loaded whole: 4 decoder layers in float32 {LAYER_COPIES * needs.layer / GIB:.2f}, activations of "
        f"{samples * length:,} tokens {needs.activation_bytes / GIB:.2f}",
        *needs.lines(),
        f"work          {flops / 1e12:.2f} TFLOP a forward pass over these tokens; a default run takes about 10",
        "a default run, Wanda at 50 % and the default rebuild:",
        forecast(source, settings, settings.sparsity_pattern(), samples, length),
    ]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
