"""`optimum-barber compare`: producers, rebuilders, patterns and settings on equal terms."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..prune.settings import BarberConfig
from ..runs.compare.settings import AXES, CompareSettings
from .flags import add_fields, add_run, flag_values
from .prune import add_shared
from .terminal import write_done

HELP = "Compare mask methods on the same calibration and evaluation text; writes a table, a CSV file and an HTML page."
EPILOG = f"""\
Every combination of the axes is a cell. A second run computes only cells that are missing or changed. The exit status
is 1 if a cell failed. Axes of --vary:
  {", ".join(AXES[:10])},
  {", ".join(AXES[10:])}

examples:
  optimum-barber compare MODEL --producers magnitude wanda --rebuilds none barber+swaps --patterns unstructured 2:4 \\
      --sparsities 0.5 0.6 --calibration c4 --evaluation wikitext2 -o DIR
  optimum-barber compare MODEL --producers wanda --rebuilds barber,rounds=1 --sparsities 0.5 \\
      --vary granularity=block,layer,output,input --calibration text.txt --evaluation test.txt -o DIR
"""
AXIS_FLAGS = ("producers", "rebuilds", "patterns", "sparsities", "vary", "rebuild_args")
MASKS = ("ignore", "allow_dense_rest", "calibrate_all_experts", "effort", "allocation", "allocation_args")
EVALUATION = ("evaluation", "windows", "tasks", "limit", "task_batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_run(parser, "directory of the cells and tables", overwrite=False)
    parser.add_argument("--dry-run", action="store_true", help="check the settings and list the cells, without a run")
    add_fields(parser, CompareSettings, ("keep_masks",))
    add_fields(parser.add_argument_group("axes"), CompareSettings, AXIS_FLAGS)
    add_fields(parser.add_argument_group("evaluation"), CompareSettings, EVALUATION)
    masks = parser.add_argument_group("masks, the same for all cells")
    add_fields(masks, BarberConfig, MASKS)
    add_shared(parser)


def run(args: argparse.Namespace) -> int:
    """Run all cells; one line per cell, the table at the end; 1 if one failed."""
    settings = {**flag_values(args, BarberConfig), **flag_values(args, CompareSettings)}
    settings["vary"] = {name: values.split(",") for name, values in settings.get("vary", {}).items()}
    if args.dry_run:
        return _list_cells(args, settings)
    from ..runs.compare import compare
    from ..runs.report.comparison import all_runs
    from ..runs.report.markdown import rows

    if not args.quiet:
        settings["tell"] = _tell
    done = compare(args.model, args.output, quiet=args.quiet, **settings)
    if not args.quiet:
        sys.stdout.write(f"\n{rows(all_runs([*done.cells.values()], done.dense))}\n\nwritten to {done.output}\n")
    for name in done.failed:
        sys.stderr.write(f"optimum-barber: {name} failed: {done.cells[name]['error']}\n")
    return 1 if done.failed else 0


def _list_cells(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    from ..runs.compare.plan import plan_of, split

    plan = plan_of(args.model, Path(args.output), *split(settings))
    for name in plan.fingerprints:
        state = "done already" if plan.read(name) else "to do"
        sys.stdout.write(f"{state:<14}{name}\n")
    return 0


def _tell(name: str, record: Mapping[str, Any], reused: bool) -> None:
    text = record.get("error") or f"perplexity {record['perplexity']['perplexity']:.6g}"
    if "seconds" in record:
        text += f", {record['seconds']:.1f} s"
    write_done(name, text, reused)
