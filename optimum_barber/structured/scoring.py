"""The pass that ranks heads and channels: every block once, on the dense stream."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..activations import Activations
from ..architectures import Structure
from ..blocks import Block, DecoderLayer
from ..errors import BarberError
from ..patterns import SparsityPattern
from ..pipeline import advance, watch
from ..source import ModelSource
from ..trial import Trial
from .choose import highest
from .scorers import ModelInput, Scorer, UnitInput
from .units import KIND_OF_BLOCK, LayerUnits, Units

Kept = dict[str, dict[str, list[int]]]  # by decoder layer and kind of units
ANY = SparsityPattern(0.5)  # a trial wants a pattern; units follow none


@dataclass
class ScorePlan:
    """What `choose_units` does to every layer.

    Attributes:
        scorer: ranks the units.
        units: heads and channels of a layer.
        structure: which Linear does what.
        kept: how many units of each kind stay.
        arguments: of the scorer.
        seed: handed to the scorer.
        batch_size: samples on the device at once; None for all.
    """

    scorer: Scorer
    units: LayerUnits
    structure: Structure
    kept: Mapping[str, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int | None = None


@torch.no_grad()
def choose_units(
    source: ModelSource, windows: Tensor, plan: ScorePlan, callback: Callable[[str], object] = lambda layer: None
) -> Kept:
    """The heads and channels that stay in every decoder layer; no weight changes.

    Args:
        source: the model.
        windows: (samples, length) int64, the calibration tokens.
        plan: scorer and counts.
        callback: called with the name of each layer that is done.
    """
    if plan.scorer.whole_model:
        given = ModelInput(source, windows, plan.units, plan.structure)
        found = plan.scorer.function(given, **plan.arguments)
        return {f"{source.path}.{i}": pick(scores, plan, f"{source.path}.{i}") for i, scores in enumerate(found)}
    kept: Kept = {}
    hidden = Activations(source.begin(windows), plan.batch_size)
    for layer in source.layers():
        outputs: list[Activations] = []
        scores = {}
        for block in layer.blocks:
            trial = watch(layer, block, hidden, outputs, block.linears, plan.scorer.needs, ANY)
            kind = KIND_OF_BLOCK[block.name.removeprefix(f"{layer.name}.")]
            scores[kind] = plan.scorer.function(
                unit_input(layer, block, plan.units[kind], trial, plan), **plan.arguments
            )
            outputs.append(trial.targets)
        kept[layer.name] = pick(scores, plan, layer.name)
        hidden = advance(layer, hidden, outputs)
        callback(layer.name)
    return kept


def unit_input(layer: DecoderLayer, block: Block, units: Units, trial: Trial, plan: ScorePlan) -> UnitInput:
    """What the scorer sees of one block."""
    prefix = f"{layer.name}."
    linears = {name: linear for each in layer.blocks for name, linear in each.linears.items()}
    gain = layer.module.get_parameter(f"{plan.structure.norm}.weight").detach() + plan.structure.norm_offset
    return UnitInput(
        layer=layer.name,
        units=units,
        keep=plan.kept[units.kind],
        structure=plan.structure,
        weights={name.removeprefix(prefix): linear.weight.detach() for name, linear in linears.items()},
        gain=gain,
        statistics={name.removeprefix(prefix): found for name, found in trial.statistics.items()},
        seed=plan.seed,
    )


def pick(scores: Mapping[str, Any], plan: ScorePlan, layer: str) -> dict[str, list[int]]:
    """The units of highest score of each kind.

    Raises:
        BarberError: a scorer's answer that is not one finite score a unit.
    """
    kept = {}
    for kind, units in plan.units.items():
        found = scores[kind]
        if not isinstance(found, Tensor) or found.shape != (units.count,) or not found.isfinite().all():
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise BarberError(
                f"scorer's answer for the {kind} of {layer} is {got}: ({units.count},) finite scores are needed"
            )
        kept[kind] = highest(found, units, plan.kept[kind])
    return kept
