"""Scorers: functions that rank the heads or the FFN channels of a decoder layer; the highest stay."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...base.errors import BarberError
from ...base.registry import Registry
from ...models.architectures import Structure
from ...models.source import ModelSource
from ...tensors.input_statistics import STATISTICS, InputStatistics
from ..units import LayerUnits, Units


@dataclass
class UnitInput:
    """The input of a scorer for the heads or the channels of one decoder layer, all on the dense stream.

    Attributes:
        layer: name of the decoder layer, such as "model.layers.0".
        units: the heads or channels: how many, and what belongs to them.
        keep: how many will stay.
        structure: which Linear does what.
        weights: dense W, (out, in) float32, of all Linears of the layer by their name in it; not to be changed.
        gain: of the norm in front of the MLP, (hidden,).
        statistics: of the inputs of the units' Linears: those that the scorer asked for.
        seed: of this run.
    """

    layer: str
    units: Units
    keep: int
    structure: Structure
    weights: dict[str, Tensor]
    gain: Tensor
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    seed: int = 0

    @property
    def makers(self) -> list[Tensor]:
        """W_up, and W_gate where the MLP has one, (channels, hidden) each, fused ones apart."""
        names = self.structure.makers
        parts: list[Tensor] = []
        for name in dict.fromkeys(names):
            parts += self.weights[name].chunk(names.count(name))
        return parts


@dataclass
class ModelInput:
    """The input of a scorer of whole models.

    Attributes:
        source: the model.
        windows: (samples, length) int64, the calibration tokens.
        units: of every decoder layer; all are alike.
        structure: which Linear does what.
    """

    source: ModelSource
    windows: Tensor
    units: LayerUnits
    structure: Structure


ScorerFunction = Callable[..., Any]


@dataclass(frozen=True)
class Scorer:
    """A registered scorer.

    Attributes:
        function: takes a `UnitInput` and returns a score a unit, (count,); or, of the whole model, takes a
            `ModelInput` and returns such a tensor for each kind of units, one such mapping a decoder layer.
        needs: names of the input statistics to collect, out of `STATISTICS`.
        whole_model: whether it is one of whole models, which need not be run block by block.
        needs_text: whether it looks at calibration tokens at all.
    """

    function: ScorerFunction
    needs: frozenset[str] = frozenset()
    whole_model: bool = False
    needs_text: bool = True


SCORERS: Registry[Scorer] = Registry("scorer", "optimum_barber.scorers")


def scorer(
    name: str, needs: Iterable[str] = (), whole_model: bool = False, needs_text: bool = True
) -> Callable[[ScorerFunction], ScorerFunction]:
    """Register the decorated function as the scorer `name`; it stays callable as it is."""
    unknown = set(needs) - set(STATISTICS)
    if unknown:
        raise BarberError(f"scorer {name!r} needs unknown statistics {sorted(unknown)}: known are {STATISTICS}")

    def decorate(function: ScorerFunction) -> ScorerFunction:
        entry = Scorer(function, frozenset(needs), whole_model, needs_text)
        SCORERS.add(name, entry, origin=function.__module__)
        return function

    return decorate


def as_scorer(candidate: "str | ScorerFunction | Scorer") -> Scorer:
    """The scorer of a registered name, a plain function or a `Scorer`.

    A plain function may carry its needs as the attribute `needs`.
    """
    if isinstance(candidate, Scorer):
        return candidate
    if callable(candidate):
        return Scorer(candidate, frozenset(getattr(candidate, "needs", ())))
    return as_scorer(SCORERS[candidate])
