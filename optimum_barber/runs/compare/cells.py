"""The cells of a comparison: every combination of its axes as the settings of one run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from ...base.errors import BarberError, unknown_name
from ...base.fields import one_line, parse_arguments
from ...base.files import digest
from ...prune.allocations import ALLOCATIONS
from ...prune.producers import as_producer
from ...prune.rebuild_settings import RebuildConfig
from ...prune.rebuilders import chain_of
from ...prune.settings import BarberConfig
from ...tensors.patterns import SparsityPattern
from .settings import CALIBRATION_AXES, OF_A_CELL, REBUILD_AXES, CompareSettings, label_of, named

Labels = dict[str, Any]


class CompareError(BarberError):
    """All faults of a comparison, one line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(dict.fromkeys(faults)))


@contextmanager
def all_faults() -> Iterator[list[str]]:
    """Yield a list of faults, and raise CompareError with all of them at the end of the block."""
    faults: list[str] = []
    yield faults
    if faults:
        raise CompareError(faults)


@contextmanager
def noted(faults: list[str]) -> Iterator[None]:
    """Turn bad input within the block into a fault."""
    try:
        yield
    except ValidationError as error:
        faults.append(str(one_line(error)))
    except BarberError as error:
        faults.append(str(error))


@dataclass(frozen=True)
class Cell:
    """The settings of one run, and its labels: its place on every axis, None on those that mean nothing to it."""

    name: str
    labels: Labels
    config: BarberConfig


def cells_of(settings: CompareSettings, base: BarberConfig) -> list[Cell]:
    """Return all cells in order, each with the settings `base` under its own; equal runs are one cell.

    Raises:
        CompareError: every fault of every cell.
    """
    _check_axes(settings)
    cells: dict[str, Cell] = {}
    with all_faults() as faults:
        for values in _combinations(settings):
            with noted(faults):
                config = _config_of(values, settings, base)
                run = config.under(config.sparsity_pattern())
                labels = _labels_of(values, config)
                cells.setdefault(run.model_dump_json(), Cell(_name_of(labels), labels, config))
    return _with_unique_names(list(cells.values()))


def _check_axes(settings: CompareSettings) -> None:
    """Raise CompareError with all values that are not legal whatever they are combined with."""

    def check_producer(text: str) -> None:
        name, arguments = named(text)
        parse_arguments(as_producer(name).function, name, arguments)

    def check_rebuild(text: str) -> None:
        chain_of(_rebuild_of(text, settings.rebuild_args))

    def check_pattern(pattern: str) -> None:
        SparsityPattern.parse(pattern, 0.5 if pattern == "unstructured" else None)

    axes = (
        (check_producer, settings.producers),
        (check_rebuild, settings.rebuilds),
        (ALLOCATIONS.__getitem__, settings.vary.get("allocation", [])),
        (check_pattern, settings.patterns),
    )
    with all_faults() as faults:
        for check, values in axes:
            for value in values:
                with noted(faults):
                    check(value)
        if "unstructured" in settings.patterns and not settings.sparsities:
            faults.append("sparsities are missing: give shares in (0, 1), or only patterns such as 2:4")


def _rebuild_of(text: str, shared: Mapping[str, Any]) -> RebuildConfig:
    """Return the rebuild that NAME,K=V means; its own settings lie over the shared ones, and `none` has none."""
    method, own = named(text)
    for name in (*shared, *own):
        if name not in REBUILD_AXES:
            raise unknown_name("setting of a rebuild", name, REBUILD_AXES)
    return RebuildConfig(method=method) if method == "none" else RebuildConfig(method=method, **{**shared, **own})


def _combinations(settings: CompareSettings) -> Iterator[Labels]:
    """Yield the values of every combination by axis; N:M patterns have their own sparsity."""
    densities: list[tuple[str, float | None]] = []
    for pattern in settings.patterns:
        sparsities: Sequence[float | None] = settings.sparsities if pattern == "unstructured" else [None]
        densities += [(pattern, sparsity) for sparsity in sparsities]
    axes: list[Sequence[Any]] = [densities, settings.producers, settings.rebuilds, *settings.vary.values()]
    for (pattern, sparsity), producer, rebuild, *values in product(*axes):
        varied = dict(zip(settings.vary, values, strict=True))
        yield {"producer": producer, "rebuild": rebuild, "pattern": pattern, "sparsity": sparsity, **varied}


def _config_of(values: Labels, settings: CompareSettings, base: BarberConfig) -> BarberConfig:
    producer, arguments = named(values["producer"])
    shared, rebuild_args = base.model_dump(exclude=OF_A_CELL), dict(settings.rebuild_args)
    for name in settings.vary:
        if name in REBUILD_AXES:
            rebuild_args[name] = values[name]
        elif name in CALIBRATION_AXES:
            shared["calibration"][name] = values[name]
        else:
            shared[name] = values[name]
    return BarberConfig(
        **shared, producer=producer, producer_args=arguments, pattern=values["pattern"], sparsity=values["sparsity"],
        rebuild=_rebuild_of(values["rebuild"], rebuild_args),
    )  # fmt: skip


def _labels_of(values: Labels, config: BarberConfig) -> Labels:
    """Return the labels of a run; where its first masks stay, no setting of a rebuild has one."""
    labels = dict(values)
    labels["producer"], labels["rebuild"] = label_of(values["producer"]), label_of(values["rebuild"])
    labels["sparsity"] = config.sparsity_pattern().sparsity
    for name in labels:
        if name in REBUILD_AXES and not config.rebuild.chain:
            labels[name] = None
    return labels


def _name_of(labels: Labels) -> str:
    """Return a file name such as "wanda_barber_0.5_rounds=2"."""
    parts = [labels["producer"], labels["rebuild"]]
    parts.append(labels["sparsity"] if labels["pattern"] == "unstructured" else labels["pattern"])
    for axis, value in labels.items():
        if axis not in OF_A_CELL and value is not None:
            parts.append(f"{axis}={value}")
    return re.sub(r"[^\w.+=-]", "-", "_".join(map(str, parts)))[:120]


def _with_unique_names(cells: list[Cell]) -> list[Cell]:
    """Return the cells, with a digest of the settings behind each name that several have."""
    names = [cell.name for cell in cells]
    unique = []
    for cell in cells:
        if names.count(cell.name) > 1:
            mark = digest(cell.config.model_dump(mode="json", exclude={"device"}))[:8]
            cell = replace(cell, name=f"{cell.name}_{mark}")
        unique.append(cell)
    return unique
