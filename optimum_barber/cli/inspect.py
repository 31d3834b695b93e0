"""`optimum-barber inspect`: what would be pruned, and what it would take."""

import argparse
import sys

from .flags import MODEL, check_whole, whole

HELP = "Show layers, blocks and Linears of a model with an estimate of memory, work and time, or what runs it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `inspect`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--samples", type=whole, default=128, metavar="N", help="number of windows (default: 128)")
    parser.add_argument("--sequence-length", type=whole, metavar="N", help="tokens a window (default: 2048, or fewer)")
    parser.add_argument(
        "--targets", action="store_true", help="show which runtimes load this checkpoint, and which get faster from it"
    )


def run(args: argparse.Namespace) -> int:
    """Inspect; nothing but the configuration is read, and a second of the machine is taken to time it."""
    check_whole(args, "samples", 1)
    check_whole(args, "sequence_length", 1)
    from ..models.loading import resolve_model
    from ..prune.inspection import inspect_model, inspect_targets

    reference = resolve_model(args.model)
    page = inspect_targets(reference) if args.targets else inspect_model(reference, args.samples, args.sequence_length)
    sys.stdout.write(page)
    return 0
