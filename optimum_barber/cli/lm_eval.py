"""`optimum-barber lm-eval`: the command line of lm-eval with model `barber` and tasks out of local files."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .launch import first

HELP = "Run lm-eval with its own subcommands and flags; a model can be pruned or shrunk on the fly."
EPILOG = """\
additions to run (its own help: optimum-barber lm-eval run --help):
  --model barber   prune or shrink `pretrained` first, or reuse the cached result of the same settings
                   (cache: $OPTIMUM_BARBER_CACHE, or optimum_barber in the Hugging Face home)
  --model_args     the settings of `optimum-barber prune`, with _ for -, and the arguments of the producer; or those of
                   `optimum-barber shrink`, chosen by scorer, remove, remove_heads, remove_channels or structure;
                   or masks=FILE for these masks over `pretrained`; or recipe=FILE for the last model of a recipe;
                   and the arguments of lm-eval's hf model
  --device         with model barber also several, such as cuda:0,cuda:1, or all: a process on each, which share the
                   requests; other models share them under `accelerate launch`
  --tasks          also choice:FILE.jsonl with rows {"question", "choices", "gold"} for accuracy, and rolling:FILE,
                   a text or rows {"text"}, for perplexity

examples:
  optimum-barber lm-eval run --model barber --model_args pretrained=MODEL,sparsity=0.5,calibration=pydoc,samples=16 \\
      --tasks choice:questions.jsonl rolling:text.txt --output_path results
  optimum-barber lm-eval run --model barber --model_args pretrained=MODEL,scorer=bip,remove=0.2,calibration=pydoc \\
      --tasks arc_easy
"""


class _Passed(argparse.Action):
    """Keeps what is passed on to lm-eval; sets the device that it names, and whether processes can share the work."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Read the arguments of lm-eval."""
        passed = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        passed.add_argument("--model", "-M", nargs="?")
        passed.add_argument("--device", nargs="?")  # lm-eval itself says that a value is missing
        known, _ = passed.parse_known_args(list(values or ()))
        namespace.arguments, namespace.device = list(values or ()), known.device
        namespace.shared = namespace.subcommand == "run" and known.model == "barber"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add lm-eval's subcommand; all other arguments are passed on."""
    parser.add_argument("subcommand", choices=("run", "ls", "validate"), help="subcommand of lm-eval")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, action=_Passed, help="arguments of the subcommand")


def run(args: argparse.Namespace) -> int:
    """Hand over to lm-eval; the additions follow its help."""
    from optimum_barber.integrations.lm_eval.run import run_harness
    from optimum_barber.runs.tasks.evaluate import check_installed

    check_installed()
    arguments = [args.subcommand, *args.arguments]
    if args.device is not None:
        arguments += ["--device", args.device]  # of this process, where several were named: the last one counts
    if not first():
        os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    try:
        run_harness(arguments)
    except SystemExit as ended:
        if not ended.code and {"-h", "--help"} & set(args.arguments):
            sys.stdout.write("\n" + EPILOG)
        raise
    return 0
