"""From settings to a cut that fits a model: everything is checked before any work."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.errors import BarberError
from ..base.fields import parse_arguments
from ..checkpoints.structure import PrunedStructure, read_structure
from ..models.architectures import Structure
from ..models.device import summing_device
from ..models.linears import check_weights
from ..models.source import ModelSource
from .choose import Budget, budget_of
from .cut import smaller_config, with_biases
from .scorers import Scorer, as_scorer
from .settings import ShrinkConfig
from .units import LayerUnits, structure_of, units_of


@dataclass
class Cut:
    """A cut that has been checked and not yet made.

    Attributes:
        source: the model.
        structure: which Linear does what.
        units: heads and channels of a layer.
        budget: how many stay.
        scorer: ranks the units.
        arguments: of the scorer.
        config: the configuration of the smaller model.
        replayed: the record to repeat instead; None where the scorer chooses.
        seed: handed to the scorer.
        batch_size: samples on the device at once; None for all.
    """

    source: ModelSource
    structure: Structure
    units: LayerUnits
    budget: Budget
    scorer: Scorer
    arguments: dict[str, Any]
    config: Any = None
    replayed: PrunedStructure | None = None
    seed: int = 0
    batch_size: int | None = None


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
    source = ModelSource(model, summing_device(config.device))
    structure = structure_of(source)
    units = units_of(source, config.head_unit if replayed is None else replayed.unit)
    linears: list[nn.Linear] = []
    for matrices in source.structure(0).matrices.values():
        linears += matrices.linears.values()
    if replayed is None:
        budget = budget_of(config, source.stack[0], units, linears)
    else:
        budget = replayed_budget(replayed, source, units)
    smaller = smaller_config(model.config, structure, units, budget.kept)
    if config.compensate:
        smaller = with_biases(smaller, structure, source.stack[0], units, budget.kept)
    check_weights(source, ())
    return Cut(source, structure, units, budget, scorer, arguments, smaller, replayed, config.seed, config.batch_size)


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
            legal = set(range(kept_units.of)).intersection(kept_units.kept)
            ascending = len(kept_units.kept) == counts[kind] and kept_units.kept == sorted(legal)
            if kept_units.of != units[kind].count or not ascending:
                raise BarberError(
                    f"structure keeps {len(kept_units.kept)} of {kept_units.of} {kind} in {name}; the model has "
                    f"{units[kind].count}, and every layer must keep the same number"
                )
    return Budget(counts, record.removed)
