"""`optimum-barber refine`: every setting is a field of `RefineConfig`, and so is its help."""

import argparse

from ..base.calibration import CalibrationConfig
from ..prune.refine.settings import RefineConfig
from .flags import add_fields, add_run, flag_values
from .terminal import write_summary

HELP = "Refine the masks of a pruned checkpoint by the KL divergence of the whole model from the dense one."
EPILOG = """\
SPARSE is a checkpoint written by prune or refine. Every row, and every N:M group, keeps its number of weights, and no
weight changes its value. The dense model must fit in memory as a whole, in float32.

examples:
  optimum-barber refine OUT --calibration pydoc --samples 32 --sequence-length 512 -o OUT_REFINED
  optimum-barber refine OUT --base MODEL --steps 200 --calibration text.txt -o OUT_REFINED
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("sparse", metavar="SPARSE", help="directory of a pruned checkpoint")
    add_run(parser, "directory of the refined checkpoint", model=False)
    parser.add_argument("--base", metavar="MODEL", help="the dense model (default: the one recorded in SPARSE)")
    add_fields(parser, CalibrationConfig)
    add_fields(parser, RefineConfig)


def run(args: argparse.Namespace) -> int:
    """Refine; the summary goes to standard output."""
    config = RefineConfig(**flag_values(args, RefineConfig))
    from ..base.output import check_output
    from ..prune.refine.refiner import BarberRefiner

    check_output(args.output, args.overwrite, [])
    refiner = BarberRefiner.for_checkpoint(args.sparse, args.base)
    result = refiner.refine(args.sparse, config, save_dir=args.output, overwrite=args.overwrite, quiet=args.quiet)
    if not args.quiet:
        report = result.as_report()
        before, after = report["divergence_before"], report["divergence_after"]
        write_summary(
            {
                "divergence": f"{before:.5g} -> {after:.5g} nats a token",
                "weights swapped": f"{report['swaps']:,}",
                "steps": str(report["looks"][-1]["step"]),
                "written to": args.output,
            }
        )
    return 0
