"""`optimum-barber`: one parser for all commands. Heavy imports happen in the command that needs them."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from pydantic import ValidationError

from ..base.bars import hidden_bars
from ..base.errors import BarberError
from ..base.fields import one_line
from ..base.launcher import launched_first, launched_several
from ..base.memory import keep_few_kernels, return_freed_buffers
from . import (
    compare,
    evaluate,
    inspect,
    lm_eval,
    own_text,
    permute,
    plugins,
    prune,
    push,
    recover,
    refine,
    report,
    shrink,
    sweep,
    verify,
)
from . import run as run_command
from .launch import Voice, joined, one_complaint
from .processes import run_on
from .terminal import hush_transformers

COMMANDS = {
    "prune": prune,
    "refine": refine,
    "recover": recover,
    "own-text": own_text,
    "shrink": shrink,
    "permute": permute,
    "sweep": sweep,
    "run": run_command,
    "compare": compare,
    "eval": evaluate,
    "lm-eval": lm_eval,
    "report": report,
    "verify": verify,
    "push": push,
    "inspect": inspect,
    "plugins": plugins,
}
SHARED = ("prune", "refine", "compare", "sweep")  # commands whose work several processes share
OWN = ("lm-eval",)  # commands that handle launchers themselves, unless their arguments set `shared`
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # OpenMP reads them once, while torch is imported


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="optimum-barber", description="Prune a causal LM and rebuild its sparsity mask with LLM-Barber."
    )
    add_commands(parser)
    return parser


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Give `parser` all commands; `optimum-cli barber` gets them from here too."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse a command line and run its command."""
    if os.environ.keys().isdisjoint(WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait in a loop keep a core from other programs
    return_freed_buffers()
    keep_few_kernels()
    with one_complaint():
        args = build_parser().parse_args(argv)
    return execute(args)


def execute(args: argparse.Namespace) -> int:
    """Run one command; 0 for success, 1 for a failed check, 2 for bad input, 130 when interrupted.

    The processes of a launcher such as torchrun share its work; only the first of them prints and logs.
    """
    own = args.command in OWN and not _shared(args)
    with nullcontext(Voice()) if own else joined() as voice:
        args.quiet = getattr(args, "quiet", False) or not (own or launched_first())
        try:
            return _run(args)
        except ValidationError as error:
            failure = one_line(error)
        except BarberError as error:
            failure = error
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            sys.stdout = open(os.devnull, "w")  # the rest of the buffer is dropped
            return 0
        except KeyboardInterrupt:
            if launched_first():
                sys.stderr.write("interrupted: nothing was left half-written\n")
            return 130
        voice.say(str(failure), failure)  # the faults of a recipe are a line each
        return failure.status


def _shared(args: argparse.Namespace) -> bool:
    """Return whether several processes share the work of a command line."""
    return args.command in SHARED or getattr(args, "shared", False)


def _execute_as_rank(settings: dict[str, Any]) -> int:
    return_freed_buffers()
    return execute(argparse.Namespace(**settings, run=COMMANDS[settings["command"]].run))


def _devices(args: argparse.Namespace) -> list[str]:
    """Return the devices that a command is to share its work among; none if it works on one."""
    asked = getattr(args, "device", None) or ""
    if asked != "all" and "," not in asked:
        return []
    from ..models.device import device_names

    devices = device_names(asked)
    if len(devices) > 1 and not _shared(args):
        raise BarberError(f"{args.command} works on one device, {asked!r} are {len(devices)}: give {devices[0]}")
    if len(devices) > 1 and launched_several():
        raise BarberError(
            f"device {asked!r} starts a process for each device: start it without a launcher, or give auto"
        )
    return devices


def _run(args: argparse.Namespace) -> int:
    level = logging.ERROR if args.quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    hush_transformers(args.quiet)
    if launched_several() and args.command not in OWN and not _shared(args):
        raise BarberError(f"{args.command} works in one process: start it without a launcher of several")
    devices = _devices(args)
    if len(devices) > 1:
        settings = {key: value for key, value in vars(args).items() if not callable(value)}
        return run_on(devices, settings, _execute_as_rank)
    with hidden_bars(args.quiet), warnings.catch_warnings():
        if args.quiet:
            warnings.simplefilter("ignore")
        return int(args.run(args) or 0)
