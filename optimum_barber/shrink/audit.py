"""Auditing a cut: a shrunk checkpoint against its `pruned_structure.json`, and against the dense model it came from."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..checkpoints.safetensors import SafetensorsWeights
from ..checkpoints.structure import PrunedStructure, read_structure
from ..models.loading import ModelReference, empty_model, load_config, load_model, local_model, resolve_model
from ..models.source import ModelSource
from .cut import cut_state
from .plan import replayed_budget
from .units import LayerUnits, Units, linear_of, units_of


@dataclass
class CutAudit:
    """What an audit of a cut found.

    Attributes:
        modules: Linears whose shapes were checked.
        kept: what stays in every decoder layer, in words.
        base: the dense model whose rows and columns the checkpoint was compared with; None where it was not.
        reason: why it was not.
        faults: one line for every module that is off.
    """

    modules: int
    kept: str
    base: str | None = None
    reason: str = ""
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = f"every kept weight is that of {self.base}" if self.base else f"only shapes were checked: {self.reason}"
        return f"{self.modules} modules cut to {self.kept}: {'FAILED' if self.faults else f'as recorded; {found}'}"


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
    small = ModelSource(empty_model(load_config(resolve_model(str(directory)), quantized=True)))
    units = units_of(small, record.unit)
    audit = CutAudit(len(record.layers) * len(linears_of_units(units)), kept_in_words(record))
    audit.faults = [*count_faults(record, small, units), *shape_faults(record, small.stack[0], units, stored)]
    dense, audit.reason = base_of(record, base) if weights else (None, "as asked")
    if dense is not None:
        audit.base = dense.name
        known = {fault.partition(":")[0] for fault in audit.faults}
        found = weight_faults(record, stored, dense)
        audit.faults += [f"{module}: {fault}" for module, fault in found.items() if module not in known]
    return audit


def base_of(record: PrunedStructure, base: str | None) -> tuple[ModelReference | None, str]:
    """The dense model to compare with; or None, and why.

    Raises:
        BarberError: it was named, and cannot be compared.
    """
    changed = f"weights have changed since, by {record.steps[-1]['name']}" if record.steps else ""
    if base is not None and changed:
        raise BarberError(f"base {base!r} cannot be compared with this checkpoint: {changed}")
    if base is not None:
        return resolve_model(base), ""
    name = record.base_model["name"]
    found = None if changed or name is None else local_model(name)
    if found is not None:
        return found, ""
    return None, changed or f"base model {name or 'without a name'} is not at hand; --base names it"


def kept_in_words(record: PrunedStructure) -> str:
    """What stays in the first decoder layer; the others have the same."""
    layer = next(iter(record.layers.values()))
    names = {"heads": f"{record.head_unit}s", "channels": "FFN channels"}
    return ", ".join(f"{len(found.kept)} of {found.of} {names[kind]}" for kind, found in layer)


def linears_of_units(units: LayerUnits) -> dict[str, Units]:
    """The Linears of a decoder layer that a cut changes, and the units that they hold."""
    return {part.linear: unit for unit in units.values() for part in unit.slices}


def count_faults(record: PrunedStructure, small: ModelSource, units: LayerUnits) -> Iterable[str]:
    """Where config.json says other numbers than the record."""
    if len(small) != len(record.layers):
        yield f"config.json: {len(small)} decoder layers, recorded are {len(record.layers)}"
    for kind, unit in units.items():
        counts = {len(dict(layer)[kind].kept) for layer in record.layers.values()}
        if counts != {unit.count}:
            said = " and ".join(map(str, sorted(counts)))
            yield f"config.json: {unit.count} {unit.name}s a layer, recorded are {said}"


def shape_faults(
    record: PrunedStructure, layer: nn.Module, units: LayerUnits, stored: SafetensorsWeights
) -> Iterable[str]:
    """Linears, and their biases, whose shape is not what the record says."""
    for path, structure in record.layers.items():
        for name, unit in linears_of_units(units).items():
            count = len(dict(structure)[unit.kind].kept)
            try:
                fault = shape_fault(f"{path}.{name}", linear_of(layer, name), name, unit, count, stored)
            except BarberError as error:
                fault = str(error)
            if fault:
                yield f"{path}.{name}: {fault}"


def shape_fault(
    path: str, linear: nn.Linear, name: str, unit: Units, count: int, stored: SafetensorsWeights
) -> str | None:
    """One Linear's fault, None where its shape is as recorded.

    Args:
        path: its full name.
        linear: what config.json makes of it.
        name: in the decoder layer.
        unit: the units that it holds.
        count: how many of them the record keeps.
        stored: the checkpoint.
    """
    widths = [sum(p.width for p in unit.slices if (p.linear, p.axis) == (name, axis)) for axis in (0, 1)]
    more = count - unit.count
    rows, columns = (size + more * width for size, width in zip(linear.weight.shape, widths, strict=True))
    found = [("weight", stored.linear(path), [rows, columns])]
    if linear.bias is not None:
        found.append(("bias", stored.tensor(f"{path}.bias"), [rows]))
    for kind, tensor, shape in found:
        if list(tensor.shape) != shape:
            return f"{kind} of shape {tuple(tensor.shape)}, recorded are {count} {unit.name}s, so {tuple(shape)}"
    return None


def weight_faults(record: PrunedStructure, stored: SafetensorsWeights, dense: ModelReference) -> dict[str, str]:
    """Modules of the checkpoint that are not, bit for bit, what the recorded cut makes of the dense model."""
    model: Any = load_model(dense, record.base_model["dtype"])
    source = ModelSource(model)
    try:
        units = units_of(source, record.unit)
        replayed_budget(record, source, units)
    except BarberError as error:
        return {dense.name: str(error)}
    expected = cut_state(model.state_dict(), record.kept, units)
    added = {f"{layer}.{name}.bias" for layer in record.layers for name in linears_of_units(units)}
    return differences(expected, stored, added if record.settings.get("compensate") else set())


def differences(expected: Mapping[str, Tensor], stored: SafetensorsWeights, but: Collection[str]) -> dict[str, str]:
    """What is off, by module, but for some tensors; tied weights, which a checkpoint holds once, count once."""
    held = {expected[key].data_ptr() for key in stored.entries if key in expected}
    faults = {
        key.rpartition(".")[0]: f"{key.rpartition('.')[2]} is missing"
        for key, tensor in expected.items()
        if key not in stored.entries and tensor.data_ptr() not in held
    }
    for key in sorted(set(stored.entries) - set(but)):
        module, _, kind = key.rpartition(".")
        if key not in expected:
            faults[module] = f"{kind} is none of the dense model's"
        elif not same(expected[key], stored.tensor(key)):
            faults[module] = f"{kind} is not what the recorded cut makes of the dense model's"
    return faults


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
