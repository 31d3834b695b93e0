"""From a configuration to a plan that fits a model; everything is checked before any work."""

from dataclasses import dataclass
from typing import Any

from ..base.errors import BarberError
from ..base.fields import parse_arguments
from ..base.ranks import ALONE, Ranks
from ..models.device import product_precision
from ..models.linears import (
    Shapes,
    check_dense_rest,
    check_routed,
    check_shared,
    check_weights,
    has_routed_experts,
    matrices_of_model,
    target_names,
)
from ..models.source import ModelSource
from ..tensors.patterns import SparsityPattern
from ..text.windows import TokenWindows
from .allocations import ALLOCATIONS
from .effort import AUTO, UNIFORM
from .pipeline import Plan
from .producers import Producer, as_producer
from .rebuilders import chain_of
from .reconstructions import reconstructions_of
from .settings import BarberConfig

SEQUENTIAL = {"rebuild": {"besa"}, "reconstruct": {"gradient"}}  # methods that take one sample after the other


@dataclass
class Run:
    """A pruning run, checked and ready to start."""

    config: BarberConfig  # the rebuild method is chosen for the pattern
    source: ModelSource
    plan: Plan
    windows: TokenWindows
    base_model: str | None  # name of the dense model, for the record


def precision_for(config: BarberConfig, source: ModelSource) -> str:
    """Return the precision of float32 products for a model on its device; `auto` is decided here."""
    return product_precision(config.precision, source.device, has_routed_experts(source))


def check_shareable(config: BarberConfig, ranks: Ranks) -> None:
    """Refuse methods whose work several ranks cannot share."""
    if ranks.count == 1:
        return
    chains = {"rebuild": config.rebuild.chain, "reconstruct": config.reconstruct.chain}
    for setting, sequential in SEQUENTIAL.items():
        for method in sequential.intersection(chains[setting]):
            raise BarberError(
                f"{setting} {method!r} steps from sample to sample, which {ranks.count} ranks cannot share: "
                "take another, or one process"
            )


def make_plan(config: BarberConfig, source: ModelSource, ranks: Ranks = ALONE) -> Plan:
    """Producer, rebuilders and pattern of a configuration; raises BarberError for all that does not fit the model."""
    check_shareable(config, ranks)
    producer = as_producer(config.producer)
    arguments = parse_arguments(producer.function, config.producer_name, config.producer_args)
    check_allocation(config, producer)
    chain_of(config.rebuild)  # unknown names first of all
    linears = matrices_of_model(source)
    targets = Shapes({name: linears[name] for name in target_names(linears, config.ignore)}, linears)
    pattern = _pattern_of(config, producer, arguments, targets)
    for name, (_, width) in targets.items():
        pattern.check_width(name, width)
    if not any(pattern.pruned(width) for _, width in targets.values()):
        raise BarberError(f"sparsity {pattern.sparsity:g} prunes nothing: no row is wide enough for one weight")
    config = config.under(pattern, shares=producer.brings_pattern is None)
    check_allocation(config, producer)
    check_dense_rest(source, config.allow_dense_rest)
    check_shared(source, targets)
    if config.calibrate_all_experts:
        check_routed(source)
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
        all_experts=config.calibrate_all_experts,
        relative_error=config.rebuild.error == "relative",
        ranks=ranks,
    )


def check_allocation(config: BarberConfig, producer: Producer) -> None:
    """Refuse an unknown allocation, arguments that it does not take, and one for masks that are there already."""
    if config.allocation == AUTO:
        return
    parse_arguments(ALLOCATIONS[config.allocation], config.allocation, config.allocation_args, "allocation")
    if producer.brings_pattern is not None and config.allocation != UNIFORM:
        raise BarberError(
            f"allocation {config.allocation!r} has nothing to share out: "
            f"producer {config.producer_name!r} brings its masks"
        )


def _pattern_of(config: BarberConfig, producer: Producer, arguments: dict[str, Any], shapes: Shapes) -> SparsityPattern:
    """The configured pattern, or the one that a producer of outside masks brings."""
    if producer.brings_pattern is None:
        return config.sparsity_pattern()
    brought = producer.brings_pattern(shapes, **arguments)
    if config.sparsity is None and config.pattern in (None, "unstructured"):
        configured = SparsityPattern(brought.sparsity)
    else:
        configured = config.sparsity_pattern()
    if abs(configured.sparsity - brought.sparsity) > 5e-3:
        masks = f"the masks of {config.producer_name!r}: {brought.sparsity:.4f}"
        raise BarberError(f"sparsity {configured.sparsity:g} contradicts {masks}")
    if config.pattern is None:
        return config.checked(brought)
    return SparsityPattern(brought.sparsity, configured.keep, configured.group)
