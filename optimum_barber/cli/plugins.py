"""`optimum-barber plugins`: what is registered, and by whom."""

import argparse
import inspect
import sys

HELP = "List producers, rebuilders, scorers, architectures and texts, with where they come from."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`plugins` takes nothing."""


def run(args: argparse.Namespace) -> int:
    """One line an entry: name, origin, and what a producer needs and takes."""
    from ..architectures import ARCHITECTURES
    from ..calibration import TEXTS
    from ..producers import PRODUCERS
    from ..rebuilders import REBUILDERS
    from ..structured.scorers import SCORERS

    for registry in (PRODUCERS, REBUILDERS, SCORERS, ARCHITECTURES, TEXTS):
        sys.stdout.write(f"{registry.kind}s\n")
        for name in registry:
            sys.stdout.write(f"  {name:<12} {registry.origin(name):<40} {details(registry, name)}".rstrip() + "\n")
    return 0


def details(registry: object, name: str) -> str:
    """What a producer needs and takes, or the error of a plug-in that cannot be imported."""
    from ..producers import Producer
    from ..structured.scorers import Scorer

    try:
        item = registry[name]  # type: ignore[index]
    except Exception as error:  # a broken plug-in must not take the others down
        return f"BROKEN: {type(error).__name__}: {error}"
    if not isinstance(item, Producer | Scorer):
        return ""
    takes = [f"{n}={p.default}" if p.default is not inspect.Parameter.empty else n for n, p in item.arguments.items()]
    return "; ".join(
        f"{label} {', '.join(parts)}" for label, parts in (("needs", sorted(item.needs)), ("takes", takes)) if parts
    )
