"""`optimum-barber verify`: whether a checkpoint still holds the masks, or the cut, in its record."""

import argparse
import sys

HELP = (
    "Check a checkpoint or an adapter against its record: masks, hashes, pattern, every zero, kept heads and channels, "
    "their order."
)
EPILOG = "The exit status is 1 if anything differs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument(
        "directory", metavar="OUT", help="a pruned, shrunk, permuted, merged or quantized checkpoint, or an adapter"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="dense model to compare a shrunk or permuted checkpoint with (default: the recorded one, if available)",
    )


def run(args: argparse.Namespace) -> int:
    """Verify; one line per fault, then the totals."""
    from ..runs.verify import verify_product

    outcome = verify_product(args.directory, args.base)
    for fault in outcome.faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(f"{outcome}\n")
    return 1 if outcome.faults else 0
