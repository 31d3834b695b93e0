"""`optimum-barber own-text`: every setting is a field of `OwnTextConfig`, and so is its help."""

import argparse
import sys

from ..text.own_text.settings import OwnTextConfig
from .flags import add_fields, add_run, flag_values
from .terminal import hush_loading_bars

HELP = "Have a model write its own calibration text, where there is no other."
EPILOG = """\
The text is drawn token by token from the dense model, which lies in memory as a whole. --calibration takes the file.
Real text of what the model is for is better, where there is some.

An instruction-tuned model whose text begins like a chat writes chats; --start '<|endoftext|>', or what else stood
between its training documents, has it write those.

examples:
  optimum-barber own-text MODEL -o own.jsonl
  optimum-barber prune MODEL --sparsity 0.5 --calibration own.jsonl -o OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `own-text`."""
    add_run(parser, "the .jsonl file that is written", metavar="FILE")
    add_fields(parser, OwnTextConfig)


def run(args: argparse.Namespace) -> int:
    """Write the text; the summary goes to standard output."""
    config = OwnTextConfig(**flag_values(args, OwnTextConfig))
    from ..text.own_text.writer import write_own_text

    hush_loading_bars(args.quiet)
    documents = write_own_text(args.model, args.output, config, args.overwrite, args.quiet)
    if not args.quiet:
        size = sum(map(len, documents))
        sys.stdout.write(f"documents           {len(documents):,}, {size:,} characters\n")
        sys.stdout.write(f"written to          {args.output}\n")
    return 0
