"""`optimum-barber plugins`: what is registered, by whom, and what is broken."""

import argparse
import sys
from typing import Any

from ..base.registry import Offer, PluginError, Registry

HELP = "List everything that has a name, from producers to texts: what it takes, from where, and what is broken."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`plugins` takes nothing."""


def run(args: argparse.Namespace) -> int:
    """One line an offer: name, origin, version, state, and what a producer needs and takes."""
    from ..models.architectures import ARCHITECTURES
    from ..prune.allocations import ALLOCATIONS
    from ..prune.producers import PRODUCERS
    from ..prune.rebuilders import REBUILDERS
    from ..prune.reconstructions import RECONSTRUCTIONS
    from ..shrink.scorers import SCORERS
    from ..text.sources import TEXTS

    tables = {
        registry.kind: [
            (offer.name, offer.package, offer.version, *state(registry, offer)) for offer in registry.offers()
        ]
        for registry in (PRODUCERS, ALLOCATIONS, REBUILDERS, RECONSTRUCTIONS, SCORERS, ARCHITECTURES, TEXTS)
    }
    widths = [max(len(row[column]) for rows in tables.values() for row in rows) for column in range(4)]
    for kind, rows in tables.items():
        sys.stdout.write(f"{kind}s\n")
        for *row, details in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            sys.stdout.write("  ".join(["", *cells, details]).rstrip() + "\n")
    return 0


def state(registry: Registry[Any], offer: Offer) -> tuple[str, str]:
    """Whether an offer is ok or BROKEN, with what a producer needs and takes, or the plug-in's own error."""
    try:
        item = registry.load(offer)
    except PluginError as error:
        own, rest = error.__cause__, str(error).removeprefix(f"{registry.kind} {offer.name!r} of {offer} ")
        return "BROKEN", " ".join((f"{type(own).__name__}: {own}" if own else rest).split())
    return "ok", needs_and_takes(item) if registry.kind in ("producer", "allocation", "scorer") else ""


def needs_and_takes(item: Any) -> str:
    """The statistics that a producer or scorer asks for, and arguments with their defaults."""
    from ..prune.allocations import Allocation
    from ..prune.producers import as_producer
    from ..shrink.scorers import Scorer

    producer = item if isinstance(item, Scorer | Allocation) else as_producer(item)
    takes = [
        n if p.default is p.empty else f"{n}={p.default or repr(p.default)}" for n, p in producer.arguments.items()
    ]
    parts = (("needs", sorted(getattr(producer, "needs", ()))), ("takes", takes))
    return "; ".join(f"{label} {', '.join(names)}" for label, names in parts if names)
