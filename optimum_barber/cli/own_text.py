"""`optimum-barber own-text`: every setting is a field of `OwnTextConfig`, and so is its help."""

import argparse

from ..text.own_text.settings import OwnTextConfig
from .flags import add_fields, add_run, flag_values
from .terminal import write_summary

HELP = "Let a model generate its own calibration text, for use where there is no better text."
EPILOG = """\
The dense model must fit in memory as a whole. Real text of the model's domain gives better masks. An instruction-tuned
model may begin with chats; --start '<|endoftext|>', or its own document separator, leads to plain documents.

examples:
  optimum-barber own-text MODEL -o own.jsonl
  optimum-barber prune MODEL --sparsity 0.5 --calibration own.jsonl -o OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_run(parser, "the .jsonl file to write", metavar="FILE")
    add_fields(parser, OwnTextConfig)


def run(args: argparse.Namespace) -> int:
    """Write the text; the summary goes to standard output."""
    config = OwnTextConfig(**flag_values(args, OwnTextConfig))
    from ..text.own_text.writer import write_own_text

    documents = write_own_text(args.model, args.output, config, args.overwrite, args.quiet)
    if not args.quiet:
        size = sum(map(len, documents))
        write_summary({"documents": f"{len(documents):,}, {size:,} characters", "written to": args.output})
    return 0
