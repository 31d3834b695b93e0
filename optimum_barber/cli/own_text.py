"""`optimum-barber own-text`: every setting is a field of `OwnTextConfig`, and so is its help."""

import argparse
import sys

from ..text.own_text.settings import OwnTextConfig
from .prune import add_fields

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
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, GGUF file, or installed:PACKAGE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .jsonl file that is written")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, at the very end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no warnings")
    add_fields(parser, OwnTextConfig)


def run(args: argparse.Namespace) -> int:
    """Write the text; the summary goes to standard output."""
    config = OwnTextConfig(**{name: value for name, value in vars(args).items() if name in OwnTextConfig.model_fields})
    from ..text.own_text.writer import write_own_text
    from . import hush_loading_bars

    hush_loading_bars(args.quiet)
    documents = write_own_text(args.model, args.output, config, args.overwrite, args.quiet)
    if not args.quiet:
        size = sum(map(len, documents))
        sys.stdout.write(f"documents           {len(documents):,}, {size:,} characters\n")
        sys.stdout.write(f"written to          {args.output}\n")
    return 0
