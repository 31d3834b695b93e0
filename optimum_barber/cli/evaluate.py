"""`optimum-barber eval`: perplexity of one or more models in the papers' protocol."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.calibration import BOS, BOS_HELP
from ..base.errors import BarberError, FailedCheckError, unknown_name
from ..base.fields import DTYPES
from ..base.files import as_json
from .flags import LENGTH, MODEL, check_whole, whole

HELP = "Measure the perplexity of pruned models and of the dense models they come from."

EPILOG = """\
The figures of a checkpoint that this program wrote are kept in its evaluation.json, and shown in its model card.

examples:
  optimum-barber eval OUT --perplexity pydoc --perplexity text.txt --windows 40
  optimum-barber eval OUT OTHER_OUT --perplexity text.txt --json eval.json
"""

TEXT = "text or JSON file, or the evaluation part of c4, wikitext2, ptb or pydoc; repeatable"
DTYPE = "dtype of the computation: auto (float32 on a CPU, otherwise the model's own), float32, float16, bfloat16"
FLAGS: tuple[tuple[str, Any, str | None, str, str], ...] = (
    ("--sequence-length", whole, None, "N", LENGTH),
    ("--windows", whole, None, "N", "number of windows spread over the text (default: all)"),
    ("--text-field", str, "text", "NAME", "field of a JSON file (default: text)"),
    ("--bos", str, "auto", "NAME", f"windows that begin with BOS: {BOS_HELP} (default: auto)"),
    ("--dtype", str, "auto", "NAME", DTYPE),
    ("--device", str, "auto", "NAME", "device to use: auto, cpu, cuda, ..."),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL)
    parser.add_argument("--perplexity", required=True, action="append", metavar="TEXT", help=TEXT)
    for flag, reader, default, metavar, text in FLAGS:
        parser.add_argument(flag, type=reader, default=default, metavar=metavar, help=text)
    parser.add_argument("--no-baseline", action="store_true", help="do not measure the dense models")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--quiet", action="store_true", help="print no progress bars or warnings")


def run(args: argparse.Namespace) -> int:
    """Evaluate every model on every text, one model in memory at a time, and print a table for each text."""
    _check(args)
    from ..models.loading import resolve_model

    texts = list(dict.fromkeys(args.perplexity))
    references = [resolve_model(name) for name in args.models]
    dense = [] if args.no_baseline else _baselines(references)
    rows: list[dict[str, Any]] = []
    try:
        for reference in [*dense, *references]:
            for row in _rows(reference, texts, reference in dense, args):
                rows.append(row)
    finally:  # what was measured before a fault or Ctrl-C is kept
        _keep(rows, references, texts, args)
    _raise_faults(rows)
    return 0


def _keep(rows: list[dict[str, Any]], references: list[Any], texts: list[str], args: argparse.Namespace) -> None:
    """Print a table for each text, show the figures in model cards, and write them to a file where one is asked for."""
    for text in texts:
        measured = [row for row in rows if row["text"] == text and "error" not in row]
        _record(references, measured)
        _write_table(measured)
    if args.json and rows:  # written once and in place: it may be a link, a pipe, or a device such as /dev/null
        Path(args.json).write_text(as_json(rows) + "\n", encoding="utf-8")


def _raise_faults(rows: list[dict[str, Any]]) -> None:
    faults = [f"{row['model']}: {row['error']}" for row in rows if "error" in row]
    if faults:
        raise FailedCheckError("; ".join(faults))


def _check(args: argparse.Namespace) -> None:
    """Refuse what is not legal, before any work."""
    from ..text.sources import text_faults

    if args.dtype not in DTYPES:
        raise unknown_name("dtype", args.dtype, DTYPES)
    if args.bos not in BOS:
        raise unknown_name("bos", args.bos, BOS)
    check_whole(args, "sequence_length", 2)
    check_whole(args, "windows", 1)
    for fault in text_faults(args.perplexity):
        raise BarberError(fault)
    if args.json:
        _check_json(Path(args.json))


def _check_json(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise BarberError(f"json {path} cannot be written: there is no such folder")
    if path.is_dir():
        raise BarberError(f"json {path} cannot be written: it is a folder")


def _record(references: list[Any], rows: list[dict[str, Any]]) -> None:
    """Show the figures of every checkpoint that lies in a folder of the user's in its model card."""
    from ..checkpoints.base_model import recorded_base
    from ..checkpoints.card import record_evaluation

    measured = {row["model"]: row for row in rows}
    for reference in references:
        if not Path(reference.name).expanduser().is_dir() or reference.name not in measured:
            continue
        own = {**measured[reference.name], "dense_baseline": False}
        base_name = recorded_base(reference.directory)
        bases = [{**row, "dense_baseline": True} for name, row in measured.items() if _same_model(name, base_name)]
        record_evaluation(reference.directory, [*bases[:1], own])


def _same_model(name: str, other: str | None) -> bool:
    if other is None:
        return False
    return name == other or (Path(name).expanduser().is_dir() and Path(name).expanduser().resolve() == Path(other))


def _rows(reference: Any, texts: list[str], dense: bool, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Cut all texts, then measure one model on each; the row of a perplexity that is not finite holds the error."""
    from ..base.calibration import CalibrationConfig
    from ..runs.evaluate import Evaluator

    settings = CalibrationConfig(text_field=args.text_field, sequence_length=args.sequence_length, bos=args.bos)
    evaluator = Evaluator(reference.name, settings, args.dtype, args.device)
    windows = {text: evaluator.windows(text, args.windows) for text in texts}
    for text, some in windows.items():
        row = {"dense_baseline": dense, "model": reference.name}
        try:
            row |= evaluator.perplexity(some, args.quiet)
        except FailedCheckError as error:
            row |= {"text": text, "perplexity": None, "error": str(error)}
        yield row


def _baselines(references: list[Any]) -> list[Any]:
    """Return the dense models that pruned and shrunk ones came from, unless they are evaluated anyhow."""
    from ..checkpoints.base_model import recorded_base
    from ..models.loading import resolve_model

    dense: list[Any] = []
    for reference in references:
        name = recorded_base(reference.directory)
        if name is None:
            continue
        try:
            base = resolve_model(name)
        except BarberError as error:
            sys.stderr.write(f"dense baseline left out: {error}\n")
            continue
        if base.path.resolve() not in [other.path.resolve() for other in (*dense, *references)]:
            dense.append(base)
    return dense


def _write_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    width = max(len(row["model"]) for row in rows) + 8
    first = rows[0]
    begin = ", each begins with BOS" if first.get("bos") else ""
    sys.stdout.write(
        f"perplexity on {first['text']} ({first['split']} part), windows of {first['sequence_length']} tokens, "
        f"{first['windows']} of {first['available']}, {first['dtype']}{begin}\n"
    )
    for row in rows:
        name = row["model"] + (" (dense)" if row["dense_baseline"] else "")
        sys.stdout.write(f"{name:<{width}} {row['perplexity']:>12.3f}\n")
