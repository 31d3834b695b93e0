"""What the removed units contributed on average, given back as a bias (as FLAP, arXiv 2312.11983, does)."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..models.activations import Activations
from ..models.architectures import Structure
from ..models.source import ModelSource
from ..prune.pipeline import advance, watch
from .stream import ANY
from .units import HEADS, Kept, LayerUnits, kind_of, linear_of


def with_biases(config: Any, structure: Structure, layer: nn.Module, units: LayerUnits, kept: Mapping[str, int]) -> Any:
    """The smaller model's configuration with a bias in every Linear that reads units which go.

    `layer` is one of the dense model, `units` are its heads and channels, of which `kept` is the number that stays.

    Raises:
        BarberError: the configuration cannot say such a bias.
    """
    config = copy.deepcopy(config)
    for kind, unit in units.items():
        if kept[kind] == unit.count or linear_of(layer, unit.reader).bias is not None:
            continue
        flag = structure.output_bias if kind == HEADS else structure.down_bias
        if not flag or not hasattr(config, flag):
            raise BarberError(
                f"compensate needs a bias in {unit.reader}, which {type(config).__name__} cannot say: leave it out, or "
                f"keep all {kind}"
            )
        setattr(config, flag, True)
    return config


@torch.no_grad()
def mean_contributions(source: ModelSource, windows: Tensor, kept: Kept, units: LayerUnits) -> dict[str, Tensor]:
    """W_R times the mean over all tokens of x_R on the dense stream, where R are the columns of the units that go.

    As a bias it takes the mean out of the block's error W_R x_R, and so the most that a constant can.

    Args:
        source: the dense model.
        windows: (samples, length) int64.
        kept: units that stay.
        units: their rows and columns.

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


class _Sum:
    """A forward pre-hook that sums a Linear's inputs over all tokens, in float64."""

    def __init__(self) -> None:
        self.total = torch.zeros(())
        self.tokens = 0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        self.total = self.total.to(x.device) + x.double().sum(0)
        self.tokens += len(x)
