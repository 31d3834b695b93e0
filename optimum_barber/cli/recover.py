"""`optimum-barber recover`: every setting is a field of `RecoverConfig`, and so is its help."""

import argparse

from optimum_barber.integrations.training.settings import RecoverConfig

from ..base.calibration import CalibrationConfig
from .flags import add_fields, add_run, flag_values
from .terminal import write_summary

HELP = "Train the kept weights of a pruned or shrunk checkpoint to do what the dense model does."
EPILOG = """\
SPARSE is a checkpoint of prune, refine, shrink or a later step. Its masks hold throughout; all zeros stay.
The weights with the lowest loss on held-out windows, the text's end, are written. The model, its gradient and its
optimizer need 16 bytes a weight, the dense model 4 more. A killed run goes on when it is started again.

examples:
  optimum-barber recover OUT --calibration text.txt --sequence-length 512 --steps 100 -o RECOVERED
  optimum-barber recover OUT --base MODEL --calibration text.txt --lm-weight 0.5 -o RECOVERED
"""
FIELDS = [name for name in CalibrationConfig.model_fields if name != "samples"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("sparse", metavar="SPARSE", help="directory of a pruned or shrunk checkpoint")
    add_run(parser, "directory of the recovered checkpoint", model=False)
    parser.add_argument("--base", metavar="MODEL", help="the dense model (default: the one recorded in SPARSE)")
    add_fields(parser, CalibrationConfig, FIELDS)
    add_fields(parser, RecoverConfig)


def run(args: argparse.Namespace) -> int:
    """Recover; the summary goes to standard output."""
    config = RecoverConfig(**flag_values(args, RecoverConfig))
    from optimum_barber.integrations.training.recover import BarberRecoverer

    recoverer = BarberRecoverer(args.sparse, args.base)
    report = recoverer.recover(config, args.output, overwrite=args.overwrite, quiet=args.quiet).report
    if not args.quiet:
        losses = [look["loss"] for look in report["held_out_loss"]]
        before, after = report["perplexity_before"]["perplexity"], report["perplexity_after"]["perplexity"]
        write_summary(
            {
                "held-out loss": f"{losses[0]:.4g} -> {min(losses):.4g} nats a token",
                "held-out perplexity": f"{before:.2f} -> {after:.2f}",
                "steps": f"{report['steps']} in {report['seconds']:.0f} s",
                "written to": args.output,
            },
            width=20,
        )
    return 0
