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
    """Shape (out, in) of every Linear by full name, for every block by name."""
    return {
        f"{source.path}.{index}.{block}": {
            f"{source.path}.{index}.{name}": (linear.out_features, linear.in_features)
            for name, linear in linears_of(layer, members).items()
        }
        for index, layer in enumerate(source.stack)
        for block, members in source.architecture.blocks.items()
    }


def linear_shapes(source: ModelSource) -> dict[str, tuple[int, int]]:
    """Shape (out, in) of every Linear of every block, by full name."""
    return {name: shape for linears in block_shapes(source).values() for name, shape in linears.items()}


def prunable(source: ModelSource, ignore: Sequence[str]) -> Sizes:
    """Weights of every Linear that is to be pruned, for every block that has any."""
    sizes = {
        block: {n: out * width for n, (out, width) in shapes.items() if not any(fnmatchcase(n, g) for g in ignore)}
        for block, shapes in block_shapes(source).items()
    }
    return {block: linears for block, linears in sizes.items() if linears}


def target_names(names: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """The Linears that no glob of `ignore` matches.

    Raises:
        BarberError: a glob matches nothing, or nothing is left.
    """
    names = list(names)
    for glob in ignore:
        if not any(fnmatchcase(name, glob) for name in names):
            raise BarberError(f"ignore {glob!r} matches no Linear, such as {names[0]}")
    targets = [name for name in names if not any(fnmatchcase(name, glob) for glob in ignore)]
    if not targets:
        raise BarberError(f"ignore {list(ignore)} leaves no Linear to prune")
    return targets


def check_weights(source: ModelSource, targets: Iterable[str], ranks: Ranks = ALONE) -> None:
    """Refuse NaN and Inf anywhere, and targets that hold nothing but zeros; each rank looks at its part."""
    names = {f"{name}.weight": name for name in targets}
    for name, weight in islice(source.weights(), ranks.index, None, ranks.count):
        ends = torch.stack(weight.detach().aminmax()) if weight.numel() else torch.zeros(2)  # NaN where any value is
        if not ends.isfinite().all():
            raise BarberError(f"model has NaN or Inf in {name}")
        if name in names and not ends.any():
            raise BarberError(f"model has nothing to prune in {names[name]}: all its weights are zero")
