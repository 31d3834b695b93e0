"""From a configuration to a plan that fits a model: everything is checked here, before any work."""

from typing import Any

from ..base.arguments import parse_arguments
from ..base.errors import BarberError
from ..base.ranks import ALONE, Ranks
from ..models.linears import check_weights, linear_shapes, target_names
from ..models.source import ModelSource
from ..tensors.patterns import SparsityPattern
from ..text.windows import TokenWindows
from .allocations import as_allocation
from .pipeline import Plan
from .producers import Producer, as_producer
from .rebuilders import chain_of
from .reconstructions import reconstructions_of
from .settings import AUTO, UNIFORM, BarberConfig


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
    config = config.under(pattern, shares=producer.brings_pattern is None)
    check_allocation(config, producer)
    check_weights(source, targets, ranks)
    return Plan(
        producer=producer,
        pattern=pattern,
        arguments=arguments,
        rebuilders=chain_of(config.rebuild),
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
    if config.allocation == AUTO:
        return
    parse_arguments(as_allocation(config.allocation), config.allocation, config.allocation_args, "allocation")
    if producer.brings_pattern is not None and config.allocation != UNIFORM:
        whose = f"producer {config.producer_name!r} brings its masks"
        raise BarberError(f"allocation {config.allocation!r} has nothing to share out: {whose}")


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
