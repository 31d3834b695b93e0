"""The cells of a comparison: every combination of its axes as the settings of one run, all faults found at once."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from ...base.errors import BarberError, unknown_name
from ...base.fields import one_line
from ...prune.rebuild_settings import RebuildConfig
from ...prune.settings import BarberConfig
from ...tensors.patterns import SparsityPattern
from .settings import CALIBRATION_AXES, REBUILD_AXES, CompareSettings, label_of, named

CORE = ("producer", "rebuild", "pattern", "sparsity")
Labels = dict[str, str | float | None]


class CompareError(BarberError):
    """All faults of a comparison, one line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(dict.fromkeys(faults)))


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: of its files.
        labels: its place on every axis; None on those that mean nothing to it.
        config: its settings.
    """

    name: str
    labels: Labels
    config: BarberConfig


def cells_of(settings: CompareSettings, base: BarberConfig) -> list[Cell]:
    """All cells in order; combinations that come to the same run are one.

    Args:
        settings: the axes.
        base: what all cells have in common; its producer, rebuild, pattern and sparsity do not count.

    Raises:
        CompareError: every fault of every cell.
    """
    found: dict[str, Cell] = {}
    check_axes(settings)
    faults: list[str] = []
    for labels in combinations(settings):
        with noted(faults):
            config = config_of(labels, settings, base)
            run = config.under(config.sparsity_pattern())
            found.setdefault(run.model_dump_json(), Cell("", meaningful(labels, config), config))
    if faults:
        raise CompareError(faults)
    return with_names(list(found.values()))


@contextmanager
def noted(faults: list[str]) -> Iterator[None]:
    """Inside, bad input becomes a fault, and the work goes on behind it."""
    try:
        yield
    except ValidationError as error:
        faults.append(str(one_line(error)))
    except BarberError as error:
        faults.append(str(error))


def check_axes(settings: CompareSettings) -> None:
    """Every value of every axis on its own.

    Raises:
        CompareError: all that are not legal whatever they are combined with.
    """
    from ...base.arguments import parse_arguments
    from ...prune.allocations import as_allocation
    from ...prune.producers import as_producer
    from ...prune.rebuilders import chain_of

    faults: list[str] = []
    for text in settings.producers:
        with noted(faults):
            name, arguments = named(text)
            parse_arguments(as_producer(name), name, arguments)
    for text in settings.rebuilds:
        with noted(faults):
            chain_of(rebuild_of(text, settings.rebuild_args))
    for name in settings.vary.get("allocation", []):
        with noted(faults):
            as_allocation(name)
    for pattern in settings.patterns:
        with noted(faults):
            SparsityPattern.parse(pattern, 0.5 if pattern == "unstructured" else None)
    if "unstructured" in settings.patterns and not settings.sparsities:
        faults.append("sparsities are missing: give shares in (0, 1), or only patterns such as 2:4")
    if faults:
        raise CompareError(faults)


def rebuild_of(text: str, shared: Mapping[str, Any]) -> RebuildConfig:
    """The rebuild that NAME,K=V means; its own settings lie over the shared ones, and `none` has none."""
    method, own = named(text)
    for name in (*shared, *own):
        if name not in REBUILD_AXES:
            raise unknown_name("setting of a rebuild", name, REBUILD_AXES)
    return RebuildConfig(method=method, **({} if method == "none" else {**shared, **own}))


def combinations(settings: CompareSettings) -> Iterator[Labels]:
    """The labels of every combination; N:M patterns have their own sparsity."""
    densities: list[tuple[str, float | None]] = []
    for pattern in settings.patterns:
        densities += [(pattern, s) for s in settings.sparsities] if pattern == "unstructured" else [(pattern, None)]
    for (pattern, sparsity), producer, rebuild, *values in product(
        densities, settings.producers, settings.rebuilds, *settings.vary.values()
    ):
        axes = dict(zip(settings.vary, values, strict=True))
        yield {"producer": producer, "rebuild": rebuild, "pattern": pattern, "sparsity": sparsity, **axes}


def config_of(labels: Mapping[str, Any], settings: CompareSettings, base: BarberConfig) -> BarberConfig:
    """The settings of the run that the labels mean."""
    producer, arguments = named(labels["producer"])
    axes = {name: labels[name] for name in settings.vary}
    shared = base.model_dump(exclude={"producer", "producer_args", "rebuild", "pattern", "sparsity"})
    given = {**shared, **{k: v for k, v in axes.items() if k not in (*REBUILD_AXES, *CALIBRATION_AXES)}}
    given["calibration"] |= {k: v for k, v in axes.items() if k in CALIBRATION_AXES}
    varied = {k: v for k, v in axes.items() if k in REBUILD_AXES}
    return BarberConfig(
        **given, producer=producer, producer_args=arguments, pattern=labels["pattern"], sparsity=labels["sparsity"],
        rebuild=rebuild_of(labels["rebuild"], {**settings.rebuild_args, **varied}),
    )  # fmt: skip


def meaningful(labels: Labels, config: BarberConfig) -> Labels:
    """The labels with None where the first masks stay and so no setting of a rebuild counts; sparsity as it is."""
    sparsity = config.sparsity_pattern().sparsity
    kept = {k: None if k in REBUILD_AXES and not config.rebuild.chain else v for k, v in labels.items()}
    return {**kept, **{name: label_of(str(labels[name])) for name in ("producer", "rebuild")}, "sparsity": sparsity}


def with_names(cells: list[Cell]) -> list[Cell]:
    """The cells with a file name each, out of their labels."""
    from ...base.fingerprint import digest

    names = [name_of(cell.labels) for cell in cells]
    found = []
    for name, cell in zip(names, cells, strict=True):
        mark = "" if names.count(name) == 1 else "_" + digest(cell.config.model_dump(mode="json"))[:8]
        found.append(Cell(name + mark, cell.labels, cell.config))
    return found


def name_of(labels: Labels) -> str:
    """A file name such as "wanda_barber_0.5_rounds=2"."""
    axes = [f"{k}={v}" for k, v in labels.items() if k not in CORE and v is not None]
    density = labels["sparsity"] if labels["pattern"] == "unstructured" else labels["pattern"]
    said = "_".join(map(str, [labels["producer"], labels["rebuild"], density, *axes]))
    return re.sub(r"[^\w.+=-]", "-", said)[:120]
