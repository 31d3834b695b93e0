"""`optimum-barber compare`: producers, rebuilders, patterns and settings on equal terms."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ..base.calibration import FLAT, nested
from ..prune.settings import BarberConfig, ReconstructConfig
from ..runs.compare.settings import AXES, CompareSettings
from .options import add_calibration, number, pairs, whole
from .prune import HAND_MADE, RECONSTRUCT, add_allocation, add_fields, field_help

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
LISTS = {"producers": "NAME", "rebuilds": "NAME", "patterns": "N:M", "tasks": "TASK"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `compare`."""
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, GGUF file, or installed:PACKAGE")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where cells and tables go")
    parser.add_argument("--dry-run", action="store_true", help="check the settings, list the cells, do nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no warnings, no table")
    axes = parser.add_argument_group("axes")
    for name, metavar in LISTS.items():
        flags = ["--rebuilds", "--rebuilders"] if name == "rebuilds" else [f"--{name}"]
        (axes if name != "tasks" else parser).add_argument(
            *flags, nargs="+", default=argparse.SUPPRESS, metavar=metavar, help=_help(name)
        )
    axes.add_argument("--sparsities", nargs="+", type=number, default=[], metavar="S", help=_help("sparsities"))
    axes.add_argument("--vary", action="append", default=[], metavar="SETTING=A,B,...", help=_help("vary"))
    axes.add_argument("--rebuild-arg", action="append", default=[], metavar="K=V", help=_help("rebuild_args"))
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--evaluation", required=True, metavar="TEXT", help=_help("evaluation"))
    for name in ("windows", "limit", "task_batch_size"):
        flag = "--" + name.replace("_", "-")
        evaluation.add_argument(flag, type=whole, default=argparse.SUPPRESS, metavar="N", help=_help(name))
    parser.add_argument("--keep-masks", action="store_true", help=_help("keep_masks"))
    text = parser.add_argument_group("calibration and machine, the same for all cells")
    add_calibration(text)
    text.add_argument("--ignore", action="append", default=[], metavar="GLOB", help="leave these Linears dense")
    add_allocation(text)
    add_fields(text, BarberConfig, {*HAND_MADE, "allocation"})
    add_fields(text, ReconstructConfig, prefix=RECONSTRUCT)


def _help(name: str) -> str:
    return field_help(CompareSettings.model_fields[name]).replace("'none', 'barber'", "none barber")


def settings_from(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags mean."""
    given = vars(args)
    own = {name: given[name] for name in CompareSettings.model_fields if name in given}
    shared = nested({name: given[name] for name in (*BarberConfig.model_fields, *FLAT) if name in given})
    vary = {name: values.split(",") for name, values in pairs("vary", args.vary, "rounds=1,2,4").items()}
    arguments = pairs("rebuild-arg", args.rebuild_arg, "rounds=2")
    shared["allocation_args"] = pairs("allocation-arg", args.allocation_arg, "spread=0.05")
    reconstruct = {n: given[RECONSTRUCT + n] for n in ReconstructConfig.model_fields if RECONSTRUCT + n in given}
    return {**shared, **own, "reconstruct": reconstruct, "vary": vary, "rebuild_args": arguments}


def run(args: argparse.Namespace) -> int:
    """Compare; a line a cell as it is done, the table at the end."""
    from pathlib import Path

    from ..runs.compare.plan import plan_of, split
    from . import hush_loading_bars

    hush_loading_bars(args.quiet)
    settings = settings_from(args)
    if args.dry_run:
        plan = plan_of(args.model, Path(args.output), *split(settings))
        for name in plan.fingerprints:
            sys.stdout.write(f"{'done already' if plan.read(name) else 'to do':<14}{name}\n")
        return 0
    return compared(args, settings)


def compared(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Run all cells; 1 where one failed."""
    from ..runs.compare import compare
    from ..runs.report.comparison import all_runs
    from ..runs.report.markdown import rows

    done = compare(args.model, args.output, quiet=args.quiet, tell=_unheard if args.quiet else tell, **settings)
    if not args.quiet:
        sys.stdout.write(f"\n{rows(all_runs([*done.cells.values()], done.dense))}\n\nwritten to {done.output}\n")
    for name in done.failed:
        sys.stderr.write(f"optimum-barber: {name} failed: {done.cells[name]['error']}\n")
    return 1 if done.failed else 0


def _unheard(name: str, record: Mapping[str, Any], reused: bool) -> None:
    """Where nobody wants a line a cell."""


def tell(name: str, record: Mapping[str, Any], reused: bool) -> None:
    """One line a cell, as soon as it is done."""
    note = " (as before)" if reused else ""
    said = record.get("error") or f"perplexity {record['perplexity']['perplexity']:.6g}"
    seconds = f", {record['seconds']:.1f} s" if "seconds" in record else ""
    sys.stdout.write(f"{name}{note}: {said}{seconds}\n")
    sys.stdout.flush()
