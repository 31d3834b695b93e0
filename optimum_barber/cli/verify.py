"""`optimum-barber verify`: does a checkpoint still hold the masks, or the cut, that it says it holds?"""

import argparse
import sys

HELP = (
    "Check masks, hashes, pattern and every zero of a checkpoint or an adapter, and what a cut left; exit status 1 if "
    "anything is off."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `verify`."""
    parser.add_argument(
        "directory", metavar="OUT", help="pruned, shrunk, merged or quantized checkpoint, or an adapter"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="of a shrunk checkpoint: the dense model whose rows it must hold (default: the recorded one, if at hand)",
    )


def run(args: argparse.Namespace) -> int:
    """Verify; one line a fault, then what was counted."""
    from ..runs.verify import verify_product

    outcome = verify_product(args.directory, args.base)
    for fault in outcome.faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(f"{outcome}\n")
    return 1 if outcome.faults else 0
