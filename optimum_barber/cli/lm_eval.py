"""`optimum-barber lm-eval`: the command line of lm-eval with model `barber` and tasks out of local files."""

import argparse
import sys

from .terminal import hush_loading_bars

HELP = "Evaluate through lm-eval, pruning or shrinking on the fly; its subcommands and flags, with additions."
EPILOG = """\
additions to run:
  --model barber       prunes or shrinks `pretrained` as the model arguments say, or takes what exactly the same
                       settings gave before (cache: $OPTIMUM_BARBER_CACHE, or optimum_barber in the Hugging Face home)
  --model_args         the settings of `optimum-barber prune` with _ for -, the producer's arguments among them;
                       or those of `optimum-barber shrink` with its scorer's: any of scorer, remove, remove_heads,
                       remove_channels and structure removes heads and channels instead of weights;
                       masks=FILE alone: these masks over `pretrained`; recipe=FILE alone: the recipe's last model;
                       and whatever lm-eval's own hf model takes
  --tasks              also choice:FILE.jsonl, rows {"question", "choices", "gold"}: accuracy;
                       and rolling:FILE, text or rows {"text"}: perplexity; the file's stem is the task's name

examples:
  optimum-barber lm-eval run --model barber --model_args pretrained=MODEL,sparsity=0.5,calibration=pydoc,samples=16 \\
      --tasks choice:questions.jsonl rolling:text.txt --output_path results
  optimum-barber lm-eval run --model barber --model_args pretrained=MODEL,producer=magnitude,pattern=2:4,rebuild=none \\
      --tasks arc_easy
  optimum-barber lm-eval run --model barber --model_args pretrained=MODEL,scorer=bip,remove=0.2,calibration=pydoc \\
      --tasks arc_easy
  optimum-barber lm-eval run --model hf --model_args pretrained=OUT --tasks rolling:text.txt
  optimum-barber lm-eval ls tasks

lm-eval's own help: optimum-barber lm-eval run --help
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """lm-eval's subcommand, and all else as it stands."""
    parser.add_argument("subcommand", choices=("run", "ls", "validate"), help="subcommand of lm-eval")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of that subcommand")


def run(args: argparse.Namespace) -> int:
    """Hand over to lm-eval; our additions follow its help."""
    from optimum_barber.integrations.lm_eval.run import run_harness
    from optimum_barber.runs.tasks.evaluate import check_installed

    check_installed()
    hush_loading_bars(quiet=False)
    try:
        run_harness([args.subcommand, *args.arguments])
    except SystemExit as ended:
        if not ended.code and {"-h", "--help"} & set(args.arguments):
            sys.stdout.write("\n" + EPILOG)
        raise
    return 0
