"""What a cut does to the hidden states: block by block on the dense stream, and layer by layer as it adds up."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import architecture_of, decoder_stack
from ..models.source import ModelSource
from .stream import dense_pass
from .units import Kept, LayerUnits, kind_of


class _Ratio:
    """||y' - y||² / ||y||², summed in float64 over many tensors."""

    def __init__(self) -> None:
        self.away = self.norm = 0.0

    def add(self, output: Tensor, dense: Tensor) -> None:
        self.away += (output - dense).double().square().sum().item()
        self.norm += dense.double().square().sum().item()

    @property
    def value(self) -> float:
        return self.away / max(self.norm, torch.finfo(torch.float64).tiny)


@torch.no_grad()
def block_errors(
    source: ModelSource,
    windows: Tensor,
    kept: Kept,
    units: LayerUnits,
    biases: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """||y' - y||² / ||y||² of every block's output y on the dense model's inputs, when only its own units go.

    Args:
        source: the dense model; its weights are the same afterwards.
        windows: (samples, length) int64.
        kept: units that stay.
        units: their rows and columns.
        biases: additions to the bias of the Linear that reads them, by its full name.

    Returns:
        `block` and `error` of each block in the order of computation.
    """
    errors = []
    for layer, block, trial in dense_pass(source, windows):
        unit = units[kind_of(block)]
        name = f"{layer.name}.{unit.reader}"
        reader, bias = block.linears[name], biases.get(name, torch.zeros(()))
        keep = unit.kept(kept[layer.name][unit.kind], reader.in_features, unit.reader, 1)
        error = _Ratio()
        with _reading_only(reader, keep):
            for x, y in zip(trial.inputs, trial.targets, strict=True):
                error.add(block(x) + bias.to(y.device, y.dtype), y)
        errors.append({"block": block.name, "error": error.value})
    return errors


@contextmanager
def _reading_only(reader: nn.Linear, keep: Tensor) -> Iterator[None]:
    """Context manager: the Linear sees zeros in the columns that are not kept."""
    dense = reader.weight.data
    reader.weight.data = dense * keep.to(dense.device)
    try:
        yield
    finally:
        reader.weight.data = dense


@torch.no_grad()
def layer_errors(model: nn.Module, small: nn.Module, windows: Tensor) -> list[float]:
    """||h' - h||² / ||h||² of every decoder layer's output h, with the errors of the layers before it.

    Args:
        model: the dense model.
        small: what was cut out of it, on the same device.
        windows: (samples, length) int64.
    """
    device = next(model.parameters()).device
    errors = [_Ratio() for _ in _layers(model)]
    with _outputs(model) as dense, _outputs(small) as cut:
        for window in windows.to(device).split(1):
            for each in (model, small):
                each(input_ids=window, use_cache=False)
            for error, h, other in zip(errors, dense, cut, strict=True):
                error.add(other, h)
            dense.clear()
            cut.clear()
    return [error.value for error in errors]


def _layers(model: nn.Module) -> nn.ModuleList:
    return decoder_stack(model, architecture_of(model))[1]


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager: a list to which every decoder layer's output is added."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in _layers(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
