"""What a cut does to the hidden states: its mean, which a bias can give back, and the errors of blocks and layers."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.activations import Activations
from ..models.architectures import architecture_of, decoder_stack
from ..models.source import ModelSource
from ..prune.pipeline import watch
from ..prune.stream import advance
from .scan import ANY, dense_pass
from .units import Kept, LayerUnits, kind_of


class _Sum:
    """A forward pre-hook that sums a Linear's inputs over all tokens, in float64."""

    def __init__(self) -> None:
        self.total, self.tokens = torch.zeros(()), 0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        self.total = self.total.to(x.device) + x.double().sum(0)
        self.tokens += len(x)


@torch.no_grad()
def mean_contributions(source: ModelSource, windows: Tensor, kept: Kept, units: LayerUnits) -> dict[str, Tensor]:
    """W_R times the mean over all tokens of x_R on the dense stream, where R are the columns of the units that go.

    As a bias it takes the mean out of the block's error W_R x_R, and so the most that a constant can (as FLAP, arXiv
    2312.11983, does).

    `windows` are (samples, length) int64.

    Returns:
        (out,) float64 on the CPU, by the full name of each Linear that reads units of which some go.
    """
    contributions: dict[str, Tensor] = {}
    hidden = Activations(source.begin(windows))
    for layer in source.layers():
        outputs: list[Activations] = []
        for block in layer.blocks:
            unit = units[kind_of(block)]
            name = f"{layer.name}.{unit.reader}"
            reader, inputs = block.linears[name], _Sum()
            handle = reader.register_forward_pre_hook(inputs)
            outputs.append(watch(layer, block, hidden, outputs, {}, frozenset(), ANY).targets)
            handle.remove()
            stays = unit.kept(kept[layer.name][unit.kind], reader.in_features, unit.reader, 1)
            if not stays.all():
                gone = (~stays).nonzero()[:, 0].to(reader.weight.device)
                mean = inputs.total / inputs.tokens
                contributions[name] = (reader.weight[:, gone].double() @ mean[gone]).cpu()
        hidden = advance(layer, hidden, outputs)
    return contributions


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


Biases = Mapping[str, Tensor]


@torch.no_grad()
def block_errors(
    source: ModelSource, windows: Tensor, kept: Kept, units: LayerUnits, biases: Biases = MappingProxyType({})
) -> list[dict[str, Any]]:
    """||y' - y||² / ||y||² of every block's output y on the dense model's inputs, when only its own units go.

    Args:
        source: the dense model; its weights are the same afterwards.
        windows: (samples, length) int64.
        kept: units that stay.
        units: of a layer.
        biases: additions to the bias of the Linear that reads them, (out,), by its full name.

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
        dense = reader.weight.data
        reader.weight.data = dense * keep.to(dense.device)
        try:
            for x, y in zip(trial.inputs, trial.targets, strict=True):
                error.add(block(x) + bias.to(y.device, y.dtype), y)
        finally:
            reader.weight.data = dense
        errors.append({"block": block.name, "error": error.value})
    return errors


@torch.no_grad()
def layer_errors(model: nn.Module, small: nn.Module, windows: Tensor) -> list[float]:
    """||h' - h||² / ||h||² of every decoder layer's output h, with the errors of the layers before it.

    `model` is the dense one, `small` what was cut out of it, on the same device; `windows` are (samples, length) int64.
    """
    device = next(model.parameters()).device
    outputs: list[list[Tensor]] = [[], []]
    with ExitStack() as stack:
        for each, seen in zip((model, small), outputs, strict=True):
            layers = decoder_stack(each, architecture_of(each))[1]
            for layer in layers:
                stack.callback(layer.register_forward_hook(partial(_keep_output, seen)).remove)
        errors = [_Ratio() for _ in layers]
        for window in windows.to(device).split(1):
            for each, seen in zip((model, small), outputs, strict=True):
                seen.clear()
                each(input_ids=window, use_cache=False)
            for error, h, other in zip(errors, *outputs, strict=True):
                error.add(other, h)
    return [error.value for error in errors]


def _keep_output(outputs: list[Tensor], _: nn.Module, __: Any, output: Any) -> None:
    outputs.append(output[0] if isinstance(output, tuple) else output)
