"""The Linears of a model that pruning may touch: names, shapes, and whether their weights are sound."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice

from torch import nn

from ..base.errors import BarberError
from ..base.ranks import ALONE, Ranks
from ..tensors.budget import Sizes
from .architectures import is_cross_attention
from .dtypes import check_range, extremes
from .matrices import is_transposed
from .source import ModelSource

logger = logging.getLogger(__name__)
MOST_DENSE = 0.1  # of the weights of all layers


class Shapes(dict[str, tuple[int, int]]):
    """Shapes (out, in) of Linears by full name.

    Attributes:
        transposed: names of those that the files hold as (in, out).
        known: names of all Linears of the model, these among them.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], known: Iterable[str] = ()) -> None:
        super().__init__({name: (linear.out_features, linear.in_features) for name, linear in linears.items()})
        self.transposed = {name for name, linear in linears.items() if is_transposed(linear)}
        self.known = {*linears, *known}


def block_shapes(source: ModelSource) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the shape (out, in) of every Linear by full name, for every block by name."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    for index in range(len(source)):
        for block, matrices in source.structure(index).matrices.items():
            shapes = blocks[block] = {}
            for name, linear in matrices.linears.items():
                shapes[name] = (linear.out_features, linear.in_features)
    return blocks


def matrices_of_model(source: ModelSource) -> dict[str, nn.Linear]:
    """Return every prunable matrix of the model as a Linear, by name in the files."""
    linears: dict[str, nn.Linear] = {}
    for index in range(len(source)):
        for matrices in source.structure(index).matrices.values():
            linears |= matrices.linears
    return linears


def parameters_of_matrices(source: ModelSource) -> dict[str, nn.Parameter]:
    """Return the parameter that holds each prunable matrix, alone or with others, by name in the files."""
    parameters: dict[str, nn.Parameter] = {}
    for index in range(len(source)):
        for matrices in source.structure(index).matrices.values():
            parameters |= matrices.sources
    return parameters


def module_names(source: ModelSource) -> dict[str, str]:
    """Return the name in memory of the module that has each prunable matrix as its weight, by name in the files.

    Experts in a parameter of all, and other parts of a weight, are left out.
    """
    owners = {id(module._parameters.get("weight")): name for name, module in source.model.named_modules()}
    linears = matrices_of_model(source)
    names: dict[str, str] = {}
    for name, weight in parameters_of_matrices(source).items():
        if id(weight) in owners and weight.numel() == linears[name].weight.numel():
            names[name] = owners[id(weight)]
    return names


def linear_shapes(source: ModelSource) -> Shapes:
    """Return the shape (out, in) of every Linear of every block, by full name."""
    return Shapes(matrices_of_model(source))


def dense_rest(source: ModelSource) -> dict[str, float]:
    """Return what stays dense in the decoder layers, as a share of their weights, by name within a layer.

    Vectors are left out, and attention to an encoder, which a causal LM does not compute.
    """
    sizes: dict[str, int] = {}
    total = 0
    for index, layer in enumerate(source.stack):
        held: set[int] = set()
        for matrices in source.structure(index).matrices.values():
            held |= matrices.parameters()
        for name, parameter in layer.named_parameters():
            if parameter.ndim < 2 or is_cross_attention(name):
                continue
            total += parameter.numel()
            if id(parameter) not in held:
                sizes[name] = sizes.get(name, 0) + parameter.numel()
    return {name: size / total for name, size in sizes.items()}


def spelled_shares(rest: Mapping[str, float]) -> str:
    """Spell what stays dense, the largest share first."""
    return ", ".join(f"{name} {rest[name]:.2%}" for name in sorted(rest, key=rest.__getitem__, reverse=True))


def check_dense_rest(source: ModelSource, allowed: bool) -> None:
    """Say what stays dense; refuse a model of which that is more than a tenth, unless it is `allowed`."""
    rest = dense_rest(source)
    if not rest:
        return
    share = sum(rest.values())
    listed = spelled_shares(rest)
    if share > MOST_DENSE and not allowed:
        raise BarberError(
            f"model has {share:.1%} of its layers' weights in parts that cannot be pruned ({listed}); "
            "--allow-dense-rest prunes the others"
        )
    logger.warning("%.2f %% of the layers' weights stay dense: %s", 100 * share, listed)


def has_routed_experts(source: ModelSource) -> bool:
    """Return whether a router sends tokens to experts in any layer."""
    for index in range(len(source)):
        if any(matrices.routed() for matrices in source.structure(index).matrices.values()):
            return True
    return False


def check_routed(source: ModelSource) -> None:
    """Refuse a model without experts to which a router sends tokens."""
    if not has_routed_experts(source):
        raise BarberError(
            f"calibrate_all_experts needs tokens that are routed to experts: {source.model_type} has none"
        )


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


def check_globs(argument: str, globs: Sequence[str], names: Sequence[str], kind: str = "Linear") -> None:
    """Refuse a glob that matches none of `names`, which are those of things of a `kind`."""
    for glob in globs:
        if not any(matches(name, [glob]) for name in names):
            raise BarberError(f"{argument} {glob!r} matches no {kind}, such as {names[0]}")


def target_names(names: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """Return the Linears that no glob of `ignore` matches; refuse a glob without a match, and one that leaves none."""
    names = list(names)
    check_globs("ignore", ignore, names)
    targets = [name for name in names if not matches(name, ignore)]
    if not targets:
        raise BarberError(f"ignore {list(ignore)} leaves no Linear to prune")
    return targets


def check_shared(source: ModelSource, targets: Iterable[str]) -> None:
    """Refuse two targets that share a weight: one mask would prune both."""
    owners: dict[int, str] = {}
    linears = matrices_of_model(source)
    for name in targets:
        weight = linears[name].weight
        owner = owners.setdefault(id(weight) if weight.is_meta else weight.data_ptr(), name)
        if owner != name:
            raise BarberError(f"model shares one weight between {owner} and {name}, which need a mask each")


def check_weights(source: ModelSource, targets: Iterable[str], ranks: Ranks = ALONE) -> None:
    """Refuse NaN and Inf anywhere, what the model's dtype cannot hold, and targets that hold nothing but zeros.

    Each rank checks a part.
    """
    names = {f"{name}.weight": name for name in targets}
    dtypes = {name: tensor.dtype for name, tensor in source.model.state_dict().items()}
    usual = next(source.model.parameters()).dtype
    for name, weight in islice(source.weights(), ranks.index, None, ranks.count):
        ends = extremes(weight)
        if not ends.isfinite().all():
            raise BarberError(f"model has NaN or Inf in {name}")
        check_range(name, ends, dtypes.get(name, usual))
        if name in names and not ends.any():
            raise BarberError(f"model has nothing to prune in {names[name]}: all its weights are zero")
