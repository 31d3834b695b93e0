"""`optimum-barber inspect`: what would be pruned, and what it would cost."""

import argparse
import sys

from .flags import LENGTH, MODEL, check_whole, whole

HELP = "Show the layers, blocks and Linears of a model and estimate the memory and time of pruning it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--samples", type=whole, default=128, metavar="N", help="number of calibration windows (default: 128)"
    )
    parser.add_argument("--sequence-length", type=whole, metavar="N", help=LENGTH)
    parser.add_argument(
        "--targets",
        action="store_true",
        help="show instead which runtimes load this checkpoint and which of them run it faster",
    )


def run(args: argparse.Namespace) -> int:
    """Inspect; reads only the configuration, and times the machine for a second."""
    check_whole(args, "samples", 1)
    check_whole(args, "sequence_length", 1)
    from ..models.loading import resolve_model
    from ..prune.inspection import inspect_model, inspect_targets

    reference = resolve_model(args.model)
    page = inspect_targets(reference) if args.targets else inspect_model(reference, args.samples, args.sequence_length)
    sys.stdout.write(page)
    return 0
