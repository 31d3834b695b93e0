"""The pass that ranks heads and channels: every block once, on the dense stream."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base.errors import BarberError
from ..models.activations import Activations
from ..models.architectures import Structure
from ..models.blocks import Block, DecoderLayer
from ..models.source import ModelSource
from ..prune.pipeline import advance, watch
from ..prune.trial import Trial
from .choose import highest
from .cut_errors import ANY
from .scorers import ModelInput, Scorer, UnitInput
from .units import KIND_OF_BLOCK, LayerUnits, Units

Kept = dict[str, dict[str, list[int]]]  # by decoder layer and kind of units


@dataclass
class ScorePlan:
    """What `choose_units` asks of every layer.

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
    source: ModelSource,
    windows: Tensor,
    plans: Sequence[ScorePlan],
    callback: Callable[[str], object] = lambda layer: None,
) -> list[Kept]:
    """The heads and channels that stay in every decoder layer under each plan; no weight changes.

    All plans that look at one block after the other share one pass, with the statistics that any of them needs.

    Args:
        source: the model.
        windows: (samples, length) int64, the calibration tokens.
        plans: scorers and counts, for the same units.
        callback: called with the name of each layer that is done.
    """
    by_block = [plan for plan in plans if not plan.scorer.whole_model]
    chosen = iter(choose_by_block(source, windows, by_block, callback) if by_block else [])
    known: dict[str, Any] = {}
    return [choose_at_once(source, windows, plan, known) if plan.scorer.whole_model else next(chosen) for plan in plans]


def choose_at_once(source: ModelSource, windows: Tensor, plan: ScorePlan, known: dict[str, Any]) -> Kept:
    """What stays by a scorer of whole models; `known` holds the scores of plans before, which counts do not change."""
    key = repr((plan.scorer.function, sorted(plan.arguments.items()), plan.units))
    if key not in known:
        given = ModelInput(source, windows, plan.units, plan.structure)
        known[key] = plan.scorer.function(given, **plan.arguments)
    return {f"{source.path}.{i}": pick(scores, plan, f"{source.path}.{i}") for i, scores in enumerate(known[key])}


def choose_by_block(
    source: ModelSource, windows: Tensor, plans: Sequence[ScorePlan], callback: Callable[[str], object]
) -> list[Kept]:
    """What stays by scorers of one block at a time."""
    kept: list[Kept] = [{} for _ in plans]
    needs = frozenset[str]().union(*(plan.scorer.needs for plan in plans))
    hidden = Activations(source.begin(windows), plans[0].batch_size)
    for layer in source.layers():
        outputs: list[Activations] = []
        scores: list[dict[str, Any]] = [{} for _ in plans]
        for block in layer.blocks:
            trial = watch(layer, block, hidden, outputs, block.linears, needs, ANY)
            kind = KIND_OF_BLOCK[block.name.removeprefix(f"{layer.name}.")]
            for plan, found in zip(plans, scores, strict=True):
                given = unit_input(layer, block, plan.units[kind], trial, plan)
                found[kind] = plan.scorer.function(given, **plan.arguments)
            outputs.append(trial.targets)
        for plan, found, stays in zip(plans, scores, kept, strict=True):
            stays[layer.name] = pick(found, plan, layer.name)
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
