"""`optimum-barber lm-eval`: the command line of lm-eval with model `barber` and tasks out of local files."""

import argparse
import sys

HELP = "Run lm-eval with its own subcommands and flags; a model can be pruned or shrunk on the fly."
EPILOG = """\
additions to run (its own help: optimum-barber lm-eval run --help):
  --model barber   prune or shrink `pretrained` first, or reuse the cached result of the same settings
                   (cache: $OPTIMUM_BARBER_CACHE, or optimum_barber in the Hugging Face home)
  --model_args     the settings of `optimum-barber prune`, with _ for -, and the arguments of the producer; or those of
                   `optimum-barber shrink`, chosen by scorer, remove, remove_heads, remove_channels or structure;
                   or masks=FILE for these masks over `pretrained`; or recipe=FILE for the last model of a recipe;
                   and the arguments of lm-eval's hf model
  --tasks          also choice:FILE.jsonl with rows {"question", "choices", "gold"} for accuracy, and rolling:FILE,
                   a text or rows {"text"}, for perplexity

examples:
  optimum-barber lm-eval run --model barber --model_args pretrained=MODEL,sparsity=0.5,calibration=pydoc,samples=16 \\
      --tasks choice:questions.jsonl rolling:text.txt --output_path results
  optimum-barber lm-eval run --model barber --model_args pretrained=MODEL,scorer=bip,remove=0.2,calibration=pydoc \\
      --tasks arc_easy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add lm-eval's subcommand; all other arguments are passed on."""
    parser.add_argument("subcommand", choices=("run", "ls", "validate"), help="subcommand of lm-eval")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the subcommand")


def run(args: argparse.Namespace) -> int:
    """Hand over to lm-eval; the additions follow its help."""
    from optimum_barber.integrations.lm_eval.run import run_harness
    from optimum_barber.runs.tasks.evaluate import check_installed

    check_installed()
    try:
        run_harness([args.subcommand, *args.arguments])
    except SystemExit as ended:
        if not ended.code and {"-h", "--help"} & set(args.arguments):
            sys.stdout.write("\n" + EPILOG)
        raise
    return 0
