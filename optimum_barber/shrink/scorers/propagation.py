"""Importance propagation as NISP (arXiv 1711.05908) has it: backwards from the last decoder layer, by weights alone."""

import torch
from torch import Tensor, nn

from ...tensors.unit_scores import input_importance, unit_sums
from ..units import CHANNELS, HEADS, Units, linear_of
from .base import ModelInput, scorer


@scorer("importance-propagation", whole_model=True, needs_text=False)
def importance_propagation(inputs: ModelInput) -> list[dict[str, Tensor]]:
    """The last layer's outputs count 1 each; |W|^T and the residuals carry that back; attention mixes nothing."""
    importance = torch.ones(linear_of(inputs.source.stack[-1], inputs.structure.down).out_features)
    scores = []
    for layer in reversed(inputs.source.stack):
        layer_scores, importance = _through_layer(layer, inputs, importance)
        scores.append(layer_scores)
        importance = importance / importance.mean()  # only ranks within a layer count, and sums would overflow
    return scores[::-1]


def _through_layer(layer: nn.Module, inputs: ModelInput, importance: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Scores of a layer's units, and the importance of its inputs, from that of its outputs, (hidden,) each."""
    structure, units = inputs.structure, inputs.units

    def weight(name: str) -> Tensor:
        return linear_of(layer, name).weight.detach().float().cpu()

    channels = input_importance(weight(structure.down), importance)
    rows: dict[str, list[Tensor]] = {}  # twice the channels where gate and up are one Linear
    for name in structure.makers:
        rows.setdefault(name, []).append(channels)
    between = importance + sum(input_importance(weight(name), torch.cat(parts)) for name, parts in rows.items())
    outputs = input_importance(weight(structure.output), between)
    value = structure.attention[2]
    values = _values(units[HEADS], outputs)  # the last rows, where they are fused with queries and keys
    part = units[HEADS].slices[-1]
    heads = unit_sums(outputs, 0, part.start, part.width, units[HEADS].count)
    return {HEADS: heads, CHANNELS: channels}, between + input_importance(weight(value)[-len(values) :], values)


def _values(heads: Units, outputs: Tensor) -> Tensor:
    """The importance of each value channel, (values,): the sum over the query heads that read it."""
    groups = heads.groups if heads.alone else heads.count
    size = heads.slices[-1].width // heads.heads
    return outputs.reshape(groups, -1, size).sum(1).flatten()
