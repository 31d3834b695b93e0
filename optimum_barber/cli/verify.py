"""`optimum-barber verify`: does a checkpoint still hold the masks that it says it holds?"""

import argparse
import sys

HELP = "Check masks, hashes, pattern and every zero of a checkpoint or an adapter; exit status 1 if anything is off."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `verify`."""
    parser.add_argument("directory", metavar="OUT", help="pruned, merged or quantized checkpoint, or an adapter")


def run(args: argparse.Namespace) -> int:
    """Verify; one line a fault, and a last line that counts."""
    from ..verify import verify_product

    outcome = verify_product(args.directory)
    for fault in outcome.faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(
        f"{outcome.modules} modules, pattern {outcome.pattern}, {outcome.zeros:,} of {outcome.pruned:,} zeros kept: "
        f"{'FAILED' if outcome.faults else 'all as recorded'}\n"
    )
    return 1 if outcome.faults else 0
