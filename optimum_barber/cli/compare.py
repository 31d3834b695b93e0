"""`optimum-barber compare`: producers, rebuilders, patterns and settings on equal terms."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ..prune.settings import BarberConfig
from ..runs.compare.settings import AXES, CompareSettings
from .flags import add_fields, add_run, flag_values
from .prune import add_shared, shared_settings
from .terminal import hush_loading_bars, write_done

HELP = "Compare mask methods on one calibration set and one evaluation: table, CSV and HTML page."
EPILOG = f"""\
Every combination is a cell. N:M patterns have their own sparsity; --sparsities is for `unstructured`. A producer or a
rebuilder may carry settings: sparsegpt,update=false or barber,rounds=1,granularity=output. DIR holds compare.csv,
compare.md, report.html, compare.json and a JSON file of each cell; a second run does only what is missing or changed.
Exit status 1 where a cell failed half-way.

axes of --vary: {", ".join(AXES)}

examples:
  optimum-barber compare MODEL --producers magnitude wanda --rebuilds none barber+swaps --patterns unstructured 2:4 \\
      --sparsities 0.5 0.6 --calibration c4 --evaluation wikitext2 --samples 16 --sequence-length 512 -o DIR
  optimum-barber compare MODEL --producers wanda --rebuilds barber --sparsities 0.5 --rebuild-arg rounds=1 \\
      --vary granularity=block,layer,output,input --vary rebuild_ratio=0.001,0.01,0.1 --calibration text.txt \\
      --evaluation test.txt -o DIR
  optimum-barber report DIR -o REPORT                     # the page with a PNG of every chart
"""
AXIS_FLAGS = ("producers", "rebuilds", "patterns", "sparsities", "vary", "rebuild_args")
EVALUATION = ("evaluation", "windows", "tasks", "limit", "task_batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `compare`."""
    add_run(parser, "where cells and tables go", overwrite=False)
    parser.add_argument("--dry-run", action="store_true", help="check the settings, list the cells, do nothing")
    add_fields(parser, CompareSettings, ("keep_masks",))
    add_fields(parser.add_argument_group("axes"), CompareSettings, AXIS_FLAGS)
    add_fields(parser.add_argument_group("evaluation"), CompareSettings, EVALUATION)
    masks = parser.add_argument_group("masks, the same for all cells")
    add_fields(masks, BarberConfig, ("ignore", "effort", "allocation", "allocation_args"))
    add_shared(parser)


def settings_from(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags mean."""
    own = flag_values(args, CompareSettings)
    own["vary"] = {name: values.split(",") for name, values in own.get("vary", {}).items()}
    return {**flag_values(args, BarberConfig), **own, **shared_settings(args)}


def run(args: argparse.Namespace) -> int:
    """Compare; a line a cell as it is done, the table at the end."""
    from pathlib import Path

    from ..runs.compare.plan import plan_of, split

    hush_loading_bars(args.quiet)
    settings = settings_from(args)
    if args.dry_run:
        plan = plan_of(args.model, Path(args.output), *split(settings))
        for name in plan.fingerprints:
            state = "done already" if plan.read(name) else "to do"
            sys.stdout.write(f"{state:<14}{name}\n")
        return 0
    return compared(args, settings)


def compared(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Run all cells; 1 where one failed."""
    from ..runs.compare import compare
    from ..runs.report.comparison import all_runs
    from ..runs.report.markdown import rows

    if not args.quiet:
        settings = {**settings, "tell": tell}
    done = compare(args.model, args.output, quiet=args.quiet, **settings)
    if not args.quiet:
        sys.stdout.write(f"\n{rows(all_runs([*done.cells.values()], done.dense))}\n\nwritten to {done.output}\n")
    for name in done.failed:
        sys.stderr.write(f"optimum-barber: {name} failed: {done.cells[name]['error']}\n")
    return 1 if done.failed else 0


def tell(name: str, record: Mapping[str, Any], reused: bool) -> None:
    """One line a cell, as soon as it is done."""
    figures = record.get("error") or f"perplexity {record['perplexity']['perplexity']:.6g}"
    seconds = f", {record['seconds']:.1f} s" if "seconds" in record else ""
    write_done(name, f"{figures}{seconds}", reused)
