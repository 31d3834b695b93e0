"""`optimum-barber plugins`: what is registered, by which package, and what is broken."""

import argparse
import sys
from typing import Any

from ..base.fields import keyword_only
from ..base.registry import Offer, PluginError, Registry

HELP = "List all producers, allocations, rebuilders, scorers and texts with their arguments, packages and faults."
WITH_ARGUMENTS = ("producer", "allocation", "scorer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no flags."""


def run(args: argparse.Namespace) -> int:
    """Print one line per name: package, version, state, needed statistics and arguments."""
    from ..models.architectures import ARCHITECTURES
    from ..prune.allocations import ALLOCATIONS
    from ..prune.producers import PRODUCERS
    from ..prune.rebuilders import REBUILDERS
    from ..prune.reconstructions import RECONSTRUCTIONS
    from ..shrink.scorers import SCORERS
    from ..text.sources import TEXTS

    kinds: list[str] = []
    rows: list[tuple[str, ...]] = []
    for registry in (PRODUCERS, ALLOCATIONS, REBUILDERS, RECONSTRUCTIONS, SCORERS, ARCHITECTURES, TEXTS):
        for offer in registry.offers():
            kinds.append(registry.kind)
            rows.append((offer.name, offer.package, offer.version, *_state(registry, offer)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading = ""
    for kind, row in zip(kinds, rows, strict=True):
        if kind != heading:
            heading = kind
            sys.stdout.write(f"{kind}s\n")
        sys.stdout.write("  ".join(["", *map(str.ljust, row, widths)]).rstrip() + "\n")
    return 0


def _state(registry: Registry[Any], offer: Offer) -> tuple[str, str]:
    try:
        item = registry.load(offer)
    except PluginError as error:
        text = str(error).removeprefix(f"{registry.kind} {offer.name!r} of {offer} ")
        if error.__cause__ is not None:
            text = f"{type(error.__cause__).__name__}: {error.__cause__}"
        return "BROKEN", " ".join(text.split())
    details = _needs_and_takes(item) if registry.kind in WITH_ARGUMENTS else ""
    return "ok", details


def _needs_and_takes(item: Any) -> str:
    arguments = []
    for name, parameter in keyword_only(getattr(item, "function", item)).items():
        if parameter.default is not parameter.empty:
            name += f"={str(parameter.default) or repr('')}"
        arguments.append(name)
    parts = []
    for verb, names in (("needs", sorted(getattr(item, "needs", ()))), ("takes", arguments)):
        if names:
            parts.append(f"{verb} {', '.join(names)}")
    return "; ".join(parts)
