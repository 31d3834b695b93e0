"""`optimum-barber plugins`: what is registered, by whom, and what is broken."""

import argparse
import sys
from inspect import Parameter
from typing import Any

from ..base.fields import keyword_only
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

    tables: dict[str, list[list[str]]] = {}
    for registry in (PRODUCERS, ALLOCATIONS, REBUILDERS, RECONSTRUCTIONS, SCORERS, ARCHITECTURES, TEXTS):
        tables[registry.kind] = rows_of(registry)
    everything = [row for rows in tables.values() for row in rows]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    for kind, rows in tables.items():
        sys.stdout.write(f"{kind}s\n")
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            sys.stdout.write("  ".join(["", *cells]).rstrip() + "\n")
    return 0


def rows_of(registry: Registry[Any]) -> list[list[str]]:
    """Name, package, version, state and details of all that a registry offers."""
    return [[offer.name, offer.package, offer.version, *state(registry, offer)] for offer in registry.offers()]


def state(registry: Registry[Any], offer: Offer) -> tuple[str, str]:
    """Whether an offer is ok or BROKEN, with what a producer needs and takes, or the plug-in's own error."""
    try:
        item = registry.load(offer)
    except PluginError as error:
        text = str(error).removeprefix(f"{registry.kind} {offer.name!r} of {offer} ")
        if error.__cause__ is not None:
            text = f"{type(error.__cause__).__name__}: {error.__cause__}"
        return "BROKEN", " ".join(text.split())
    if registry.kind not in ("producer", "allocation", "scorer"):
        return "ok", ""
    return "ok", needs_and_takes(item)


def needs_and_takes(item: Any) -> str:
    """The statistics that a producer or scorer asks for, and arguments with their defaults."""
    parts = []
    needs = getattr(item, "needs", ())
    if needs:
        parts.append(f"needs {', '.join(sorted(needs))}")
    arguments = keyword_only(getattr(item, "function", item))
    if arguments:
        parts.append(f"takes {', '.join(map(shown, arguments.values()))}")
    return "; ".join(parts)


def shown(parameter: Parameter) -> str:
    """An argument with its default, if it has one."""
    if parameter.default is Parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default or repr(parameter.default)}"
