"""`optimum-barber refine`: every setting is a field of `RefineConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import CalibrationConfig
from ..prune.refine.settings import RefineConfig
from .flags import add_fields, add_run, flag_values
from .terminal import hush_loading_bars

HELP = "Refine the masks of a pruned checkpoint by the divergence of its next token from the dense model's."
EPILOG = """\
prune looks at one block at a time, refine at the whole model: it takes the gradient of KL(dense || sparse) by all
weights, kept and pruned, lets each row exchange one pair that lowers it, as far as windows that it did not learn from
(every fourth) agree, and does so again. No weight changes its value; every row, and every N:M group, keeps as many as
before. The dense model lies in memory as a whole, in float32, with several times the weights that are pruned.

SPARSE is a checkpoint that prune or refine wrote; DIR is the same with better masks, and its report.json says by how
much.

examples:
  optimum-barber refine OUT --calibration pydoc --samples 32 --sequence-length 512 -o OUT_REFINED
  optimum-barber refine OUT --base MODEL --rounds 4 --calibration text.txt -o OUT_REFINED
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `refine`."""
    parser.add_argument("sparse", metavar="SPARSE", help="directory of a pruned checkpoint")
    add_run(parser, "where the checkpoint goes", model=False)
    parser.add_argument("--base", metavar="MODEL", help="the dense model (default: the one that SPARSE says)")
    add_fields(parser, CalibrationConfig)
    add_fields(parser, RefineConfig)


def run(args: argparse.Namespace) -> int:
    """Refine; the summary goes to standard output."""
    settings = {"calibration": flag_values(args, CalibrationConfig), **flag_values(args, RefineConfig)}
    config = RefineConfig(**settings)
    from ..base.output import check_output
    from ..prune.refine.refiner import BarberRefiner

    hush_loading_bars(args.quiet)
    check_output(args.output, args.overwrite, [])
    refiner = BarberRefiner.for_checkpoint(args.sparse, args.base)
    result = refiner.refine(args.sparse, config, save_dir=args.output, overwrite=args.overwrite, quiet=args.quiet)
    if not args.quiet:
        sys.stdout.write(summary(result.as_report(), args.output))
    return 0


def summary(report: dict[str, Any], output: str) -> str:
    """What a run did, in a few lines."""
    return (
        f"divergence          {report['divergence_before']:.5g} -> {report['divergence_after']:.5g} nats a token\n"
        f"weights swapped     {report['swaps']:,}\n"
        f"rounds              {len(report['rounds'])}\n"
        f"written to          {output}\n"
    )
