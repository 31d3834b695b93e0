"""`optimum-barber report`: one page out of any finished run."""

import argparse
import sys

HELP = "Write one self-contained HTML page, and pictures, about a finished run."
EPILOG = """\
OUT is the output of prune, shrink, run or compare, or one cell file of compare. Charts and pictures need the extra
`report`; without it the page has tables.

examples:
  optimum-barber report OUT -o report                     # report/index.html and a PNG of every chart
  optimum-barber eval OUT --perplexity pydoc && optimum-barber report OUT --overwrite
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("run_output", metavar="OUT", help="a finished run: its directory, or a cell's JSON file")
    parser.add_argument(
        "-o", "--output", metavar="FILE_OR_DIR",
        help="FILE.html for the page alone, or a directory for page and pictures (default: OUT/report.html)",
    )  # fmt: skip
    parser.add_argument(
        "--eval",
        metavar="FILE",
        help="perplexities to show, from eval --json (default: what eval kept in OUT)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    parser.add_argument("--quiet", action="store_true", help="print nothing")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from ..runs.report import write_report

    files = write_report(args.run_output, args.output, args.eval, args.overwrite)
    if not args.quiet:
        pictures = f" and {len(files) - 1} pictures" if len(files) > 1 else ""
        sys.stdout.write(f"report: {files[0]}{pictures}\n")
    return 0
