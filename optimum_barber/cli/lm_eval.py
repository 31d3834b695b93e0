"""`optimum-barber lm-eval`: the command line of lm-eval with model `barber` and tasks out of local files."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.launcher import launched_first, launched_several
from .launch import one_complaint

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


class _HarnessArguments(argparse.Action):
    """Keeps the arguments of lm-eval; sets the device that they name, and whether processes can share the work."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Read the arguments of lm-eval."""
        arguments = [str(value) for value in values or ()]
        reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flags in (("--model", "-M"), ("--config", "-C"), ("--device",)):
            reader.add_argument(*flags, nargs="?")  # lm-eval itself says that a value is missing
        own, _ = reader.parse_known_args(arguments)
        settings = _settings_in(own.config)
        namespace.arguments, namespace.device = arguments, own.device or settings.get("device")
        namespace.shared = namespace.subcommand == "run" and (own.model or settings.get("model")) == "barber"


def _settings_in(path: str | None) -> dict[str, Any]:
    """Return what a configuration file of lm-eval says; nothing where lm-eval will refuse the file."""
    if path is None:
        return {}
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add lm-eval's subcommand; all other arguments are passed on."""
    parser.add_argument("subcommand", choices=("run", "ls", "validate"), help="subcommand of lm-eval")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, action=_HarnessArguments, help="arguments of the subcommand"
    )


def run(args: argparse.Namespace) -> int:
    """Hand over to lm-eval; the additions follow its help."""
    from optimum_barber.integrations.lm_eval.run import run_harness
    from optimum_barber.runs.tasks.evaluate import check_installed

    check_installed()
    arguments, device = [args.subcommand, *args.arguments], args.device
    if device is None and args.shared and launched_several():
        from ..models.device import choose_device

        device = str(choose_device("auto"))  # lm-eval's own default is the first GPU, for all processes
    if device is not None:
        arguments += ["--device", device]  # of this process, where several were named: the last one counts
    if not launched_first():
        os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    try:
        with one_complaint():
            run_harness(arguments)
    except SystemExit as ended:
        if not ended.code and {"-h", "--help"} & set(args.arguments):
            sys.stdout.write("\n" + EPILOG)
        raise
    return 0
