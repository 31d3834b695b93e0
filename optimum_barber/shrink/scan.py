"""The ranking of heads and channels: every block once, on the dense stream."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base.errors import BarberError
from ..models.architectures import Structure
from ..models.blocks import DecoderLayer
from ..models.source import ModelSource
from ..prune.trial import Trial
from .choose import highest
from .scorers import ModelInput, Scorer, UnitInput
from .stream import dense_pass
from .units import Kept as Kept
from .units import LayerUnits, kind_of


@dataclass
class ScorePlan:
    """How the units of every layer are ranked.

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


def _ignore(layer: str) -> None:
    """Do nothing at the end of a layer."""


@torch.no_grad()
def choose_units(
    source: ModelSource, windows: Tensor, plans: Sequence[ScorePlan], callback: Callable[[str], object] = _ignore
) -> list[Kept]:
    """The heads and channels that stay in every decoder layer under each plan; no weight changes.

    All plans that rank one block after the other share one pass, with the statistics that any of them needs.

    Args:
        source: the model.
        windows: (samples, length) int64, the calibration tokens.
        plans: scorers and counts, for the same units.
        callback: called with the name of each layer that is done.
    """
    kept: list[Kept] = [{} for _ in plans]
    by_block = []
    scores: dict[str, Any] = {}  # of whole models: counts do not change them
    for plan, chosen in zip(plans, kept, strict=True):
        if plan.scorer.whole_model:
            choose_at_once(source, windows, plan, scores, chosen)
        else:
            by_block.append((plan, chosen))
    if by_block:
        choose_by_block(source, windows, by_block, callback)
    return kept


def choose_at_once(source: ModelSource, windows: Tensor, plan: ScorePlan, scores: dict[str, Any], kept: Kept) -> None:
    """Fill `kept` by a scorer of whole models; `scores` holds those of earlier plans."""
    key = repr((plan.scorer.function, sorted(plan.arguments.items()), plan.units))
    if key not in scores:
        model = ModelInput(source, windows, plan.units, plan.structure)
        scores[key] = plan.scorer.function(model, **plan.arguments)
    for index, layer_scores in enumerate(scores[key]):
        name = f"{source.path}.{index}"
        kept[name] = {kind: pick(layer_scores[kind], plan, kind, name) for kind in plan.units}


def choose_by_block(
    source: ModelSource,
    windows: Tensor,
    plans: Sequence[tuple[ScorePlan, Kept]],
    callback: Callable[[str], object],
) -> None:
    """Fill the second of each pair by the plan that is the first, one block at a time."""
    needs: set[str] = set()
    for plan, _ in plans:
        needs |= plan.scorer.needs
    for layer, block, trial in dense_pass(source, windows, frozenset(needs), plans[0][0].batch_size):
        kind = kind_of(block)
        for plan, kept in plans:
            scores = plan.scorer.function(unit_input(layer, kind, trial, plan), **plan.arguments)
            kept.setdefault(layer.name, {})[kind] = pick(scores, plan, kind, layer.name)
        if block is layer.blocks[-1]:
            callback(layer.name)


def unit_input(layer: DecoderLayer, kind: str, trial: Trial, plan: ScorePlan) -> UnitInput:
    """What the scorer receives for one kind of units."""
    prefix = f"{layer.name}."
    weights = {}
    for block in layer.blocks:
        for name, linear in block.linears.items():
            weights[name.removeprefix(prefix)] = linear.weight.detach()
    gain = layer.module.get_parameter(f"{plan.structure.norm}.weight").detach() + plan.structure.norm_offset
    return UnitInput(
        layer=layer.name,
        units=plan.units[kind],
        keep=plan.kept[kind],
        structure=plan.structure,
        weights=weights,
        gain=gain,
        statistics={name.removeprefix(prefix): statistics for name, statistics in trial.statistics.items()},
        seed=plan.seed,
    )


def pick(scores: Any, plan: ScorePlan, kind: str, layer: str) -> list[int]:
    """The units of one kind with the highest scores.

    Raises:
        BarberError: a scorer's answer that is not one finite score for each unit.
    """
    units = plan.units[kind]
    if not isinstance(scores, Tensor) or scores.shape != (units.count,) or not scores.isfinite().all():
        answer = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BarberError(
            f"scorer's answer for the {kind} of {layer} is {answer}: ({units.count},) finite scores are needed"
        )
    return highest(scores, units, plan.kept[kind])
