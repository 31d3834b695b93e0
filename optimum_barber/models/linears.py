"""The Linears of a model that pruning may touch: names, shapes, and whether their weights are sound."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import islice

import torch

from ..base.errors import BarberError
from ..base.ranks import ALONE, Ranks
from ..tensors.budget import Sizes
from .architectures import linears_of
from .source import ModelSource


def block_shapes(source: ModelSource) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the shape (out, in) of every Linear by full name, for every block by name."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    for index, layer in enumerate(source.stack):
        path = f"{source.path}.{index}"
        for block, members in source.architecture.blocks.items():
            shapes = blocks[f"{path}.{block}"] = {}
            for name, linear in linears_of(layer, members).items():
                shapes[f"{path}.{name}"] = (linear.out_features, linear.in_features)
    return blocks


def linear_shapes(source: ModelSource) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every Linear of every block, by full name."""
    shapes = {}
    for linears in block_shapes(source).values():
        shapes.update(linears)
    return shapes


def prunable(source: ModelSource, ignore: Sequence[str]) -> Sizes:
    """Return the number of weights of every Linear to prune, for every block that has any."""
    sizes: dict[str, dict[str, int]] = {}
    for block, shapes in block_shapes(source).items():
        for name, (rows, columns) in shapes.items():
            if not matches(name, ignore):
                sizes.setdefault(block, {})[name] = rows * columns
    return sizes


def matches(name: str, globs: Sequence[str]) -> bool:
    """True if any of the globs matches a name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def check_globs(argument: str, globs: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a glob that matches none of `names`."""
    for glob in globs:
        if not any(matches(name, [glob]) for name in names):
            raise BarberError(f"{argument} {glob!r} matches no Linear, such as {names[0]}")


def target_names(names: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """Return the Linears that no glob of `ignore` matches; refuse a glob without a match, and one that leaves none."""
    names = list(names)
    check_globs("ignore", ignore, names)
    targets = [name for name in names if not matches(name, ignore)]
    if not targets:
        raise BarberError(f"ignore {list(ignore)} leaves no Linear to prune")
    return targets


def check_weights(source: ModelSource, targets: Iterable[str], ranks: Ranks = ALONE) -> None:
    """Refuse NaN and Inf anywhere, and targets that hold nothing but zeros; each rank checks a part."""
    names = {f"{name}.weight": name for name in targets}
    for name, weight in islice(source.weights(), ranks.index, None, ranks.count):
        ends = torch.stack(weight.detach().aminmax()) if weight.numel() else torch.zeros(2)  # NaN where any value is
        if not ends.isfinite().all():
            raise BarberError(f"model has NaN or Inf in {name}")
        if name in names and not ends.any():
            raise BarberError(f"model has nothing to prune in {names[name]}: all its weights are zero")
