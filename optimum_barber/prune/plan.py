"""From a configuration to a plan that fits a model: everything is checked here, before any work."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch

from ..base.errors import BarberError
from ..base.rank_group import own_gpu
from ..base.ranks import ALONE, Ranks
from ..models.architectures import linears_of
from ..models.source import ModelSource
from ..tensors.budget import Sizes
from ..tensors.patterns import SparsityPattern
from ..text.windows import TokenWindows
from .allocations import as_allocation
from .pipeline import Plan
from .producers import Producer, as_producer, parse_arguments
from .rebuilders import chain_of
from .reconstructions import reconstructions_of
from .settings import UNIFORM, BarberConfig


def make_plan(config: BarberConfig, source: ModelSource, ranks: Ranks = ALONE) -> Plan:
    """Producer, rebuilders and pattern of a configuration, checked against the model.

    Raises:
        BarberError: an unknown name, a bad argument, a pattern that does not fit, sick weights, or what several
            ranks cannot do.
    """
    if ranks.count > 1 and "gradient" in config.reconstruct.chain:
        raise BarberError(
            f"reconstruct 'gradient' steps from sample to sample, which {ranks.count} ranks cannot share: "
            "take least-squares, or one process"
        )
    producer = as_producer(config.producer)
    arguments = parse_arguments(producer, config.producer_name, config.producer_args)
    check_allocation(config, producer)
    chain_of(config.rebuild)  # unknown names first of all
    shapes = linear_shapes(source)
    targets = {name: shapes[name] for name in target_names(shapes, config.ignore)}
    pattern = pattern_of(config, producer, arguments, targets)
    for name, (_, width) in targets.items():
        pattern.check_width(name, width)
    if not any(pattern.pruned(width) for _, width in targets.values()):
        raise BarberError(f"sparsity {pattern.sparsity:g} prunes nothing: no row is wide enough for one weight")
    check_weights(source, targets, ranks)
    return Plan(
        producer=producer,
        pattern=pattern,
        arguments=arguments,
        rebuilders=chain_of(config.rebuild.under(pattern)),
        reconstructions=reconstructions_of(config.reconstruct),
        ignore=config.ignore,
        seed=config.seed,
        batch_size=config.batch_size,
        exact=producer.brings_pattern is None,
        relative_error=config.rebuild.error == "relative",
        ranks=ranks,
    )


def check_ranks(ranks: Ranks, config: BarberConfig, windows: TokenWindows) -> None:
    """Return when all ranks are here, with the same settings and calibration tokens and a sample each.

    Raises:
        BarberError: they are not.
    """
    ranks.share(len(windows.tokens))
    if ranks.count > 1:
        settings = config.model_dump(mode="json", exclude={"device", "batch_size"})
        ranks.agree({**settings, "calibration tokens": windows.fingerprint})


def check_allocation(config: BarberConfig, producer: Producer) -> None:
    """Refuse allocations that nobody knows, arguments that they do not take, and masks that are there already."""
    parse_arguments(as_allocation(config.allocation), config.allocation, config.allocation_args, "allocation")
    if producer.brings_pattern is not None and config.allocation != UNIFORM:
        whose = f"producer {config.producer_name!r} brings its masks"
        raise BarberError(f"allocation {config.allocation!r} has nothing to share out: {whose}")


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


def pattern_of(
    config: BarberConfig, producer: Producer, arguments: dict[str, Any], shapes: dict[str, tuple[int, int]]
) -> SparsityPattern:
    """The configured pattern, or the one that a producer of outside masks brings.

    Raises:
        BarberError: what was configured contradicts what the masks hold.
    """
    if producer.brings_pattern is None:
        return config.sparsity_pattern()
    found = producer.brings_pattern(shapes, **arguments)
    unstated = config.sparsity is None and config.pattern in (None, "unstructured")
    asked = SparsityPattern(found.sparsity) if unstated else config.sparsity_pattern()
    if abs(asked.sparsity - found.sparsity) > 5e-3:
        raise BarberError(
            f"sparsity {asked.sparsity:g} contradicts the masks of {config.producer_name!r}: {found.sparsity:.4f}"
        )
    if config.pattern is None:
        return config.checked(found)
    return SparsityPattern(found.sparsity, asked.keep, asked.group)


def check_weights(source: ModelSource, targets: Iterable[str], ranks: Ranks = ALONE) -> None:
    """Refuse NaN and Inf anywhere, and targets that hold nothing but zeros; each rank looks at its part."""
    names = {f"{name}.weight": name for name in targets}
    for name, weight in islice(source.weights(), ranks.index, None, ranks.count):
        ends = torch.stack(weight.detach().aminmax()) if weight.numel() else torch.zeros(2)  # NaN where any value is
        if not ends.isfinite().all():
            raise BarberError(f"model has NaN or Inf in {name}")
        if name in names and not ends.any():
            raise BarberError(f"model has nothing to prune in {names[name]}: all its weights are zero")


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; under a launcher of several processes the GPU of this one.

    Raises:
        BarberError: there is no such device.
    """
    if device == "auto":
        return own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BarberError(f"device {device!r} is not at hand: {str(error).splitlines()[0]}") from None
    return chosen


def working_dtype(dtype: str, device: torch.device) -> str:
    """The dtype that a model is loaded in to be run: `auto` is float32 on a CPU, else the model's own."""
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype
