"""The ranking of heads and channels: every block once, on the dense stream."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import BarberError
from ..models.activations import Activations
from ..models.blocks import Block, DecoderLayer
from ..models.source import ModelSource
from ..prune.pipeline import watch
from ..prune.stream import advance
from ..prune.trial import Trial
from ..tensors.patterns import SparsityPattern
from .choose import highest
from .plan import Cut
from .scorers import ModelInput, UnitInput
from .units import Kept, kind_of

ANY = SparsityPattern(0.5)  # a trial wants a pattern; units follow none


def dense_pass(
    source: ModelSource, windows: Tensor, needs: frozenset[str] = frozenset(), batch_size: int | None = None
) -> Iterator[tuple[DecoderLayer, Block, Trial]]:
    """Run every block once on the dense stream and yield its layer, itself and its inputs and outputs.

    `windows` are (samples, length) int64; `needs` are the statistics of the inputs of the block's Linears to sum.
    """
    hidden = Activations(source.begin(windows), batch_size)
    for layer in source.layers():
        outputs: list[Activations] = []
        for block in layer.blocks:
            linears = block.linears if needs else {}
            trial = watch(layer, block, hidden, outputs, linears, needs, ANY)
            yield layer, block, trial
            outputs.append(trial.targets)
        hidden = advance(layer, hidden, outputs)


@torch.no_grad()
def choose_units(
    source: ModelSource, windows: Tensor, cuts: Sequence[Cut], callback: Callable[[str], object] = lambda layer: None
) -> list[Kept]:
    """The heads and channels that stay in every decoder layer under each cut; no weight changes.

    All scorers that rank one block after the other share one pass, with the statistics that any of them needs.

    Args:
        source: the model.
        windows: (samples, length) int64, the calibration tokens.
        cuts: of the same units.
        callback: called with the name of each layer that is done.
    """
    kept: list[Kept] = [{} for _ in cuts]
    by_block = []
    scores: dict[str, Any] = {}  # of whole models: counts do not change them
    for cut, chosen in zip(cuts, kept, strict=True):
        if cut.scorer.whole_model:
            _choose_at_once(source, windows, cut, scores, chosen)
        else:
            by_block.append((cut, chosen))
    if by_block:
        choose_by_block(source, windows, by_block, callback)
    return kept


def _choose_at_once(source: ModelSource, windows: Tensor, cut: Cut, scores: dict[str, Any], kept: Kept) -> None:
    """Fill `kept` by a scorer of whole models; `scores` holds those of earlier cuts."""
    key = repr((cut.scorer.function, sorted(cut.arguments.items()), cut.units))
    if key not in scores:
        model = ModelInput(source, windows, cut.units, cut.structure)
        scores[key] = cut.scorer.function(model, **cut.arguments)
    for index, layer_scores in enumerate(scores[key]):
        name = f"{source.path}.{index}"
        kept[name] = {kind: _pick(layer_scores[kind], cut, kind, name) for kind in cut.units}


def choose_by_block(
    source: ModelSource, windows: Tensor, cuts: Sequence[tuple[Cut, Kept]], callback: Callable[[str], object]
) -> None:
    """Fill the second of each pair by the cut that is the first, one block at a time."""
    needs: set[str] = set()
    for cut, _ in cuts:
        needs |= cut.scorer.needs
    for layer, block, trial in dense_pass(source, windows, frozenset(needs), cuts[0][0].batch_size):
        kind = kind_of(block)
        for cut, kept in cuts:
            scores = cut.scorer.function(_unit_input(layer, kind, trial, cut), **cut.arguments)
            kept.setdefault(layer.name, {})[kind] = _pick(scores, cut, kind, layer.name)
        if block is layer.blocks[-1]:
            callback(layer.name)


def _unit_input(layer: DecoderLayer, kind: str, trial: Trial, cut: Cut) -> UnitInput:
    prefix = f"{layer.name}."
    weights = {}
    for block in layer.blocks:
        for name, linear in block.linears.items():
            weights[name.removeprefix(prefix)] = linear.weight.detach()
    gain = layer.module.get_parameter(f"{cut.structure.norm}.weight").detach() + cut.structure.norm_offset
    statistics = {name.removeprefix(prefix): sums for name, sums in trial.statistics.items()}
    return UnitInput(
        layer.name, cut.units[kind], cut.budget.kept[kind], cut.structure, weights, gain, statistics, cut.seed
    )


def _pick(scores: Any, cut: Cut, kind: str, layer: str) -> list[int]:
    """The units of one kind with the highest scores.

    Raises:
        BarberError: a scorer's answer that is not one finite score for each unit.
    """
    units = cut.units[kind]
    if not isinstance(scores, Tensor) or scores.shape != (units.count,) or not scores.isfinite().all():
        answer = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BarberError(
            f"scorer's answer for the {kind} of {layer} is {answer}: ({units.count},) finite scores are needed"
        )
    return highest(scores, units, cut.budget.kept[kind])
