"""The command line: one file a command, flags out of the settings, one line for whatever goes wrong."""

from .main import COMMANDS as COMMANDS
from .main import add_commands as add_commands
from .main import build_parser as build_parser
from .main import execute as execute
from .main import main as main
