"""`optimum-barber sweep`: every setting is a field of `SweepConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import FLAT, nested
from ..runs.sweep.settings import SweepConfig
from .options import add_calibration, whole
from .prune import field_help, field_kind

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
LISTS = {"scorers": ("NAME", str), "remove": ("S", str), "samples": ("N", whole)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `sweep`."""
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, GGUF file, or installed:PACKAGE")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where tables, pictures and cells go")
    parser.add_argument("--no-latency", action="store_true", help="measure neither prefill nor decode")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no warnings")
    add_calibration(parser, leave=("samples",))
    for name, field in SweepConfig.model_fields.items():
        if name in ("calibration", "latency"):
            continue
        letter, kind = LISTS.get(name, ("N" if field_kind(field) is whole else "X", field_kind(field)))
        shape: dict[str, Any] = {"nargs": "+"} if name in LISTS else {}
        parser.add_argument(
            "--" + name.replace("_", "-"), default=argparse.SUPPRESS, metavar=letter, type=kind,
            required=field.is_required(), help=field_help(field), **shape,
        )  # fmt: skip


def config_from(args: argparse.Namespace) -> SweepConfig:
    """The configuration that the flags mean."""
    samples = {"samples": args.samples} if "samples" in args else {}
    names = {*SweepConfig.model_fields, *FLAT} - {"samples"}
    given = nested({name: value for name, value in vars(args).items() if name in names})
    return SweepConfig(**given, **samples, latency=not args.no_latency)


def run(args: argparse.Namespace) -> int:
    """Sweep; a line a cell, and the table at the end."""
    config = config_from(args)
    from ..runs.sweep.runner import run_sweep
    from . import hush_loading_bars

    hush_loading_bars(args.quiet)
    if args.quiet:
        run_sweep(args.model, config, args.output, quiet=True)
        return 0
    result = run_sweep(args.model, config, args.output, tell=tell)
    sys.stdout.write("\n" + (result.output / "table.md").read_text(encoding="utf-8"))
    return 0


def tell(name: str, result: dict[str, Any], reused: bool) -> None:
    """One line a cell, as soon as it is done."""
    note = " (as before)" if reused else ""
    sys.stdout.write(f"{name}{note}: perplexity {result['perplexity']['perplexity']:.2f}\n")
    sys.stdout.flush()
