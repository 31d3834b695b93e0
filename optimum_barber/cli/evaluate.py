"""`optimum-barber eval`: perplexity of one or more models in the papers' protocol."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..base.errors import BarberError, unknown_name
from ..base.fields import DTYPES
from .flags import MODEL, check_whole, whole
from .terminal import hush_loading_bars

HELP = "Measure perplexity, with the dense model beside the pruned ones."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `eval`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--perplexity",
        required=True,
        metavar="TEXT",
        help="text or .jsonl file, c4, wikitext2, ptb, or pydoc (their evaluation parts)",
    )
    parser.add_argument("--sequence-length", type=whole, metavar="N", help="tokens a window (default: 2048, or fewer)")
    parser.add_argument("--windows", type=whole, metavar="N", help="spread N windows over the text (default: all)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of a .jsonl file (default: text)")
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="NAME",
        help="dtype of the computation: auto (float32 on a CPU, else the model's own), float32, float16, bfloat16",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="device that computes: auto, cpu, cuda, ...")
    parser.add_argument("--no-baseline", action="store_true", help="leave the dense base of pruned models out")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no warnings")


def run(args: argparse.Namespace) -> int:
    """Evaluate every model, one in memory at a time, and print a table."""
    _check(args)
    from ..models.loading import resolve_model
    from ..runs.evaluate import evaluate_model

    hush_loading_bars(args.quiet)
    references = [resolve_model(name) for name in args.models]
    dense = [] if args.no_baseline else _baselines(references)
    rows = []
    for reference in [*dense, *references]:
        figures = evaluate_model(
            reference.name, args.perplexity, field=args.text_field, length=args.sequence_length, windows=args.windows,
            dtype=args.dtype, device=args.device, quiet=args.quiet,
        )  # fmt: skip
        rows.append({"dense_baseline": reference in dense, **figures})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(rows))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.dtype not in DTYPES:
        raise unknown_name("dtype", args.dtype, DTYPES)
    check_whole(args, "sequence_length", 2)
    check_whole(args, "windows", 1)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise BarberError(f"json {args.json} cannot be written: there is no such folder")


def _baselines(references: list[Any]) -> list[Any]:
    """The dense models that pruned and shrunk ones came from, unless they are evaluated anyhow."""
    from ..models.loading import resolve_model

    dense: list[Any] = []
    for reference in references:
        name = _base_name(reference.directory)
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


def _base_name(directory: Path) -> str | None:
    """What the record of a checkpoint says it was pruned or cut from; None where there is no record."""
    from ..checkpoints.names import SPARSITY_NAME, STRUCTURE_NAME
    from ..checkpoints.record import read_record
    from ..checkpoints.structure import read_structure

    for file, read in ((SPARSITY_NAME, read_record), (STRUCTURE_NAME, read_structure)):
        if (directory / file).is_file():
            name: str | None = read(directory).base_model["name"]
            return name
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """The results as aligned columns."""
    width = max(len(row["model"]) for row in rows) + 8
    first = rows[0]
    lines = [
        f"perplexity on {first['text']} ({first['split']} part), windows of {first['sequence_length']} tokens, "
        f"{first['windows']} of {first['available']}, {first['dtype']}"
    ]
    for row in rows:
        name = row["model"] + (" (dense)" if row["dense_baseline"] else "")
        lines.append(f"{name:<{width}} {row['perplexity']:>12.3f}")
    return "\n".join(lines) + "\n"
