"""`optimum-barber permute`: every setting is a field of `PermuteConfig`, and so is its help."""

import argparse

from ..base.calibration import CalibrationConfig
from ..shrink.permute_settings import PermuteConfig
from .flags import add_fields, add_run, flag_values
from .terminal import write_summary

HELP = "Reorder channels so that N:M masks drop less; writes an ordinary checkpoint that computes the same."
EPILOG = """\
Channels of the FFN and of attention's values change places, with --kinds those of the residual stream too; no weight
changes its value.
DIR is the dense model of all that follows: prune it, and compare pruned models with it. Masks for MODEL do not fit it.
DIR also holds channel_order.json, by which `optimum-barber verify DIR` compares every weight with MODEL's.

examples:
  optimum-barber permute MODEL --pattern 2:4 --calibration text.txt -o DIR
  optimum-barber prune DIR --pattern 2:4 --calibration text.txt -o OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_run(parser, "directory of the permuted checkpoint")
    add_fields(parser, CalibrationConfig)
    add_fields(parser, PermuteConfig)


def run(args: argparse.Namespace) -> int:
    """Permute; the summary goes to standard output."""
    config = PermuteConfig(**flag_values(args, PermuteConfig))
    from ..base.output import check_output
    from ..models.loading import load_model, load_tokenizer, resolve_model
    from ..shrink.permuter import BarberPermuter

    reference = resolve_model(args.model)
    check_output(args.output, args.overwrite, [reference.path])
    permuter = BarberPermuter(load_model(reference, config.dtype), load_tokenizer(reference), reference)
    record = permuter.permute(config, save_dir=args.output, overwrite=args.overwrite, quiet=args.quiet).record
    if not args.quiet:
        texts = {}
        for kind, (before, after) in record.dropped().items():
            texts[f"{kind} dropped"] = f"{before:.4f} -> {after:.4f} of the scores, by a {record.pattern} mask"
        write_summary({**texts, "written to": args.output}, width=20)
    return 0
