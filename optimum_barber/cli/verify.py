"""`optimum-barber verify`: does a checkpoint still hold the masks that it says it holds?"""

import argparse
import sys

HELP = "Check masks, hashes, pattern and zeros of a pruned checkpoint; exit status 1 if anything is off."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `verify`."""
    parser.add_argument("directory", metavar="OUT", help="a directory that 'prune' wrote")


def run(args: argparse.Namespace) -> int:
    """Verify; one line a fault, and a last line that counts."""
    from ..verify import verify_checkpoint

    outcome = verify_checkpoint(args.directory)
    for fault in outcome.faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(
        f"{outcome.modules} modules, pattern {outcome.pattern}, {outcome.zeros:,} of {outcome.pruned:,} zeros kept: "
        f"{'FAILED' if outcome.faults else 'all as recorded'}\n"
    )
    return 1 if outcome.faults else 0
