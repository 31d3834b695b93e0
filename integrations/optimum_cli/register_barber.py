"""`optimum-cli barber ...`: the commands of `optimum-barber`, from one definition.

Installed into the namespace package `optimum.commands.register`, where `optimum-cli` looks for it.
"""

from argparse import ArgumentParser
from typing import ClassVar

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class BarberCommand(BaseOptimumCLICommand):
    """Everything after `barber` goes to our own parser."""

    COMMAND: ClassVar = CommandInfo(name="barber", help="Prune a causal LM and rebuild its sparsity mask.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The arguments are those of `optimum-barber`."""
        from optimum_barber.cli import add_commands

        add_commands(parser)

    def run(self) -> None:
        """Run the command and leave with its exit status."""
        import sys

        from optimum_barber.cli import execute

        sys.exit(execute(self.args))


REGISTER_COMMANDS = [BarberCommand]
