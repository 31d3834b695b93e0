"""From settings to a cut that fits a model: everything is checked before any work."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.errors import BarberError
from ..base.fields import parse_arguments
from ..checkpoints.structure import PrunedStructure, read_structure
from ..models.architectures import linears_of
from ..models.device import choose_device
from ..models.linears import check_weights
from ..models.source import ModelSource
from .choose import Budget, budget_of
from .compensate import with_biases
from .cut import smaller_config
from .scorers import Scorer, as_scorer
from .settings import ShrinkConfig
from .units import LayerUnits, structure_of, units_of


@dataclass
class Cut:
    """A cut that has been checked and not yet made.

    Attributes:
        source: the model.
        units: heads and channels of a layer.
        budget: how many stay.
        config: the configuration of the smaller model.
        scorer: ranks the units.
        arguments: of the scorer.
        replayed: the record to repeat instead; None where the scorer chooses.
    """

    source: ModelSource
    units: LayerUnits
    budget: Budget
    config: Any
    scorer: Scorer
    arguments: dict[str, Any]
    replayed: PrunedStructure | None


def reads_text(config: ShrinkConfig) -> bool:
    """True if a run looks at calibration text: for its scores, or for the biases that compensate."""
    scored = config.structure is None and as_scorer(config.scorer).needs_text
    return config.compensate or scored


def plan_cut(model: Any, config: ShrinkConfig) -> Cut:
    """Check a configuration against a model and say what it cuts.

    Raises:
        BarberError: an unknown name, a share that does not fit, a model or a configuration that cannot be cut so.
    """
    scorer = as_scorer(config.scorer)
    arguments = parse_arguments(scorer.function, config.scorer, config.scorer_args, "scorer")
    replayed = read_structure(config.structure) if config.structure is not None else None
    source = ModelSource(model, choose_device(config.device))
    structure = structure_of(source)
    units = units_of(source, config.head_unit if replayed is None else replayed.unit)
    linears: list[nn.Linear] = []
    for members in source.architecture.blocks.values():
        linears += linears_of(source.stack[0], members).values()
    if replayed is None:
        budget = budget_of(config, source.stack[0], units, linears)
    else:
        budget = replayed_budget(replayed, source, units)
    smaller = smaller_config(model.config, structure, units, budget.kept)
    if config.compensate:
        smaller = with_biases(smaller, structure, source.stack[0], units, budget.kept)
    check_weights(source, ())
    return Cut(source, units, budget, smaller, scorer, arguments, replayed)


def replayed_budget(record: PrunedStructure, source: ModelSource, units: LayerUnits) -> Budget:
    """The counts of a record, if it is one of this model.

    Raises:
        BarberError: other layers, other numbers of units, units that are not there, or widths that differ.
    """
    names = [f"{source.path}.{index}" for index in range(len(source))]
    if list(record.layers) != names:
        raise BarberError(f"structure has {len(record.layers)} decoder layers, the model {len(names)}: another model's")
    counts = {kind: len(kept_units.kept) for kind, kept_units in record.layers[names[0]]}
    for name, layer in record.layers.items():
        for kind, kept_units in layer:
            if kept_units.of != units[kind].count or not _are_units(kept_units.kept, counts[kind], kept_units.of):
                raise BarberError(
                    f"structure keeps {len(kept_units.kept)} of {kept_units.of} {kind} in {name}; the model has "
                    f"{units[kind].count}, and every layer must keep the same number"
                )
    return Budget(counts, record.removed)


def _are_units(indices: list[int], count: int, total: int) -> bool:
    """True if these are `count` ascending and different indices below `total`."""
    legal = set(range(total)).intersection(indices)
    return len(indices) == count and indices == sorted(legal)
