"""`optimum-barber inspect`: what would be pruned, and what it would take."""

import argparse
import sys

from ..errors import BarberError
from .options import whole

HELP = "Show what was detected in a model, layers, blocks and Linears, and estimate memory and work."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `inspect`."""
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, GGUF file, or installed:PACKAGE")
    parser.add_argument("--samples", type=whole, default=128, metavar="N", help="for the estimate (default: 128)")
    parser.add_argument("--sequence-length", type=whole, metavar="N", help="for the estimate (default: 2048, or fewer)")


def run(args: argparse.Namespace) -> int:
    """Inspect; nothing but the configuration is read."""
    for name in ("samples", "sequence_length"):
        value = getattr(args, name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise BarberError(f"{name.replace('_', ' ')} {value} is not legal: a whole number from 1")
    from ..inspection import inspect_model
    from ..loading import resolve_model

    sys.stdout.write(inspect_model(resolve_model(args.model), args.samples, args.sequence_length))
    return 0
