"""`optimum-barber sweep`: every setting is a field of `SweepConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import CalibrationConfig
from ..runs.sweep.settings import SweepConfig
from .flags import add_fields, add_run, flag_values
from .terminal import write_done

HELP = "Shrink with several scorers, ratios and calibration sizes; writes one table and pictures."
EPILOG = """\
A stopped sweep resumes with the first missing cell. DIR holds table.md, table.csv, cells/*.json and, with the extra
`report`, pictures. No checkpoint is kept: use shrink to write one.

examples:
  optimum-barber sweep MODEL --scorers bip taylor wanda --remove 0.1 0.2 0.3 --calibration c4 --samples 16 \\
      --sequence-length 512 --evaluation wikitext2 --windows 40 -o SWEEP
  optimum-barber sweep MODEL --scorers bip taylor --remove 0.2 --samples 8 16 32 64 128 --calibration c4 \\
      --sequence-length 512 --evaluation wikitext2 -o SIZES
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_run(parser, "directory of the tables, pictures and cells", overwrite=False)
    parser.add_argument("--no-latency", action="store_true", help="do not measure prefill and decode latency")
    add_fields(parser, CalibrationConfig, ("texts", "text_field", "sequence_length", "bos"))
    add_fields(parser, SweepConfig, [name for name in SweepConfig.model_fields if name != "latency"])


def run(args: argparse.Namespace) -> int:
    """Sweep; one line per cell, and the table at the end."""
    config = SweepConfig(latency=not args.no_latency, **flag_values(args, SweepConfig))
    from ..runs.sweep.runner import run_sweep

    if args.quiet:
        run_sweep(args.model, config, args.output, quiet=True)
        return 0
    result = run_sweep(args.model, config, args.output, tell=_tell)
    sys.stdout.write("\n" + (result.output / "table.md").read_text(encoding="utf-8"))
    return 0


def _tell(name: str, result: dict[str, Any], reused: bool) -> None:
    write_done(name, f"perplexity {result['perplexity']['perplexity']:.2f}", reused)
