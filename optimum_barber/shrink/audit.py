"""Auditing a cut: a shrunk checkpoint against its `pruned_structure.json`, and against the dense model it came from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..checkpoints.safetensors import SafetensorsWeights
from ..checkpoints.structure import PrunedStructure, read_structure
from ..models.loading import ModelReference, empty_model, load_config, load_model, local_model, resolve_model
from ..models.source import ModelSource
from .cut import cut_state
from .plan import replayed_budget
from .units import LayerUnits, Units, linear_of, linears_of_units, units_of


@dataclass
class CutAudit:
    """The result of an audit of a cut.

    Attributes:
        modules: Linears whose shapes were checked.
        kept: what stays in every decoder layer, in words.
        base: the dense model whose rows and columns the checkpoint was compared with; None where it was not.
        reason: why it was not.
        faults: one line for every module that differs.
    """

    modules: int
    kept: str
    base: str | None = None
    reason: str = ""
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        result = f"as recorded; only shapes were checked: {self.reason}"
        if self.faults:
            result = "FAILED"
        elif self.base:
            result = f"as recorded; every kept weight is that of {self.base}"
        return f"{self.modules} modules cut to {self.kept}: {result}"


def audit_cut(directory: str | Path, base: str | None = None, weights: bool = True) -> CutAudit:
    """Check a shrunk checkpoint: its shapes against the record, its weights against the same cut of the dense model.

    Args:
        directory: of the checkpoint.
        base: the dense model; None for the recorded one, where it is on this machine.
        weights: whether to look at the dense model at all.

    Raises:
        BarberError: there is no record, no checkpoint or no model `base`, or weights are not those of the cut any more.
    """
    record, stored = read_structure(directory), SafetensorsWeights.open(directory)
    small = ModelSource(empty_model(load_config(resolve_model(directory), quantized=True)))
    units = units_of(small, record.unit)
    layer = next(iter(record.layers.values()))  # the others keep the same numbers
    names = {"heads": f"{record.head_unit}s", "channels": "FFN channels"}
    kept = ", ".join(f"{len(stays.kept)} of {stays.of} {names[kind]}" for kind, stays in layer)
    audit = CutAudit(len(record.layers) * len(linears_of_units(units)), kept)
    audit.faults = [*_count_faults(record, small, units), *_shape_faults(record, small.stack[0], units, stored)]
    dense, audit.reason = _base_of(record, base) if weights else (None, "as asked")
    if dense is not None:
        audit.base = dense.name
        known = {fault.partition(":")[0] for fault in audit.faults}
        for module, fault in _weight_faults(record, stored, dense).items():
            if module not in known:
                audit.faults.append(f"{module}: {fault}")
    return audit


def _base_of(record: PrunedStructure, base: str | None) -> tuple[ModelReference | None, str]:
    """The dense model to compare with; or None, and why. One that was named must be comparable."""
    if record.steps:
        changed = f"weights have changed since, by {record.steps[-1]['name']}"
        if base is not None:
            raise BarberError(f"base {base!r} cannot be compared with this checkpoint: {changed}")
        return None, changed
    name = record.base_model["name"]
    reference = dense_model(name, base)
    if reference is None:
        return None, f"base model {name or 'without a name'} is not at hand; --base names it"
    return reference, ""


def dense_model(name: str | None, base: str | None) -> ModelReference | None:
    """Return the dense model `base`; if None that of the recorded name, where it is on this machine."""
    if base is not None:
        return resolve_model(base)
    return local_model(name) if name is not None else None


def _count_faults(record: PrunedStructure, small: ModelSource, units: LayerUnits) -> Iterable[str]:
    if len(small) != len(record.layers):
        yield f"config.json: {len(small)} decoder layers, recorded are {len(record.layers)}"
    for kind, unit in units.items():
        counts = {len(kept[kind]) for kept in record.kept.values()}
        if counts != {unit.count}:
            recorded = " and ".join(map(str, sorted(counts)))
            yield f"config.json: {unit.count} {unit.name}s a layer, recorded are {recorded}"


def _shape_faults(
    record: PrunedStructure, layer: nn.Module, units: LayerUnits, stored: SafetensorsWeights
) -> Iterable[str]:
    """One line for each Linear whose weight or bias has another shape than recorded."""
    for path, kept in record.kept.items():
        for name, unit in linears_of_units(units).items():
            try:
                fault = _shape_fault(path, linear_of(layer, name), name, unit, len(kept[unit.kind]), stored)
            except BarberError as error:
                fault = str(error)
            if fault:
                yield f"{path}.{name}: {fault}"


def _shape_fault(
    layer: str, linear: nn.Linear, name: str, unit: Units, count: int, stored: SafetensorsWeights
) -> str | None:
    """The fault of the Linear `name` of a layer; None where it holds `count` units as recorded."""
    shape = list(linear.weight.shape)
    for part in unit.slices:
        if part.linear == name:
            shape[part.axis] += (count - unit.count) * part.width
    tensors = {"weight": (stored.linear(f"{layer}.{name}"), shape)}
    if linear.bias is not None:
        tensors["bias"] = (stored.tensor(f"{layer}.{name}.bias"), shape[:1])
    for kind, (tensor, expected) in tensors.items():
        if list(tensor.shape) != expected:
            return f"{kind} of shape {tuple(tensor.shape)}, recorded are {count} {unit.name}s, so {tuple(expected)}"
    return None


def _weight_faults(record: PrunedStructure, stored: SafetensorsWeights, dense: ModelReference) -> dict[str, str]:
    """Faults by module of weights that are not, bit for bit, the recorded cut of the dense model's."""
    source = ModelSource(load_model(dense, record.base_model["dtype"]))
    try:
        units = units_of(source, record.unit)
        replayed_budget(record, source, units)
    except BarberError as error:
        return {dense.name: str(error)}
    expected = cut_state(source.model.state_dict(), record.kept, units)
    biases: set[str] = set()
    if record.settings.get("compensate"):
        biases = {f"{layer}.{name}.bias" for layer in record.layers for name in linears_of_units(units)}
    return differences(expected, stored, biases)


def differences(expected: Mapping[str, Tensor], stored: SafetensorsWeights, ignored: set[str]) -> dict[str, str]:
    """Faults by module, `ignored` tensors aside; tied weights, which a checkpoint holds once, count once."""
    faults = {}
    present = {expected[key].data_ptr() for key in stored.entries if key in expected}
    for key, tensor in expected.items():
        module, _, kind = key.rpartition(".")
        if key not in stored.entries and tensor.data_ptr() not in present:
            faults[module] = f"{kind} is missing"
    for key in sorted(set(stored.entries) - ignored):
        module, _, kind = key.rpartition(".")
        if key not in expected:
            faults[module] = f"{kind} is none of the dense model's"
        elif not _same(expected[key], stored.tensor(key)):
            faults[module] = f"{kind} is not what the record makes of the dense model's"
    return faults


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
