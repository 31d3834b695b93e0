"""`optimum-barber sweep`: every setting is a field of `SweepConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import CalibrationConfig
from ..runs.sweep.settings import SweepConfig
from .flags import add_fields, add_run, flag_values
from .terminal import hush_loading_bars, write_done

HELP = "Shrink by several scorers, ratios and calibration sizes: one table, and pictures; goes on where it was stopped."
EPILOG = """\
DIR holds table.md, table.csv, cells/*.json (all that was measured, with the error of every block) and, with the extra
`report`, perplexity.png, perplexity-by-samples-RATIO.png and errors-RATIO.png. No checkpoint is kept: shrink writes it.

examples:
  optimum-barber sweep MODEL --scorers bip barber taylor wanda magnitude random --remove 0.1 0.2 0.3 0.4 0.5 \\
      --calibration c4 --samples 16 --sequence-length 512 --evaluation wikitext2 --windows 40 -o SWEEP
  optimum-barber sweep MODEL --scorers bip taylor --remove 0.2 --samples 8 16 32 64 128 --calibration c4 \\
      --sequence-length 512 --evaluation wikitext2 -o SIZES
"""
CALIBRATION = ("texts", "text_field", "sequence_length")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `sweep`."""
    add_run(parser, "where tables, pictures and cells go", overwrite=False)
    parser.add_argument("--no-latency", action="store_true", help="measure neither prefill nor decode")
    add_fields(parser, CalibrationConfig, CALIBRATION)
    add_fields(parser, SweepConfig, [name for name in SweepConfig.model_fields if name != "latency"])


def config_from(args: argparse.Namespace) -> SweepConfig:
    """The configuration that the flags mean."""
    calibration = {name: getattr(args, name) for name in CALIBRATION if name in args}
    settings = {"calibration": calibration, "latency": not args.no_latency, **flag_values(args, SweepConfig)}
    return SweepConfig(**settings)


def run(args: argparse.Namespace) -> int:
    """Sweep; a line a cell, and the table at the end."""
    config = config_from(args)
    from ..runs.sweep.runner import run_sweep

    hush_loading_bars(args.quiet)
    if args.quiet:
        run_sweep(args.model, config, args.output, quiet=True)
        return 0
    result = run_sweep(args.model, config, args.output, tell=tell)
    sys.stdout.write("\n" + (result.output / "table.md").read_text(encoding="utf-8"))
    return 0


def tell(name: str, result: dict[str, Any], reused: bool) -> None:
    """One line a cell, as soon as it is done."""
    write_done(name, f"perplexity {result['perplexity']['perplexity']:.2f}", reused)
