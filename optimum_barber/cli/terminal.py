"""What the commands write to the terminal, and what others are kept from writing there."""

import os
import sys
from collections.abc import Mapping


def hush_transformers(quiet: bool) -> None:
    """Keep the notes of transformers off pipes and out of --quiet runs, before it is imported."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def write_done(name: str, text: str, reused: bool) -> None:
    """Write one line about a finished stage or cell at once."""
    note = " (as before)" if reused else ""
    sys.stdout.write(f"{name}{note}: {text}\n")
    sys.stdout.flush()


def write_summary(texts: Mapping[str, str], width: int = 19) -> None:
    """Write one line per text behind its label, in columns."""
    for label, text in texts.items():
        sys.stdout.write(f"{label:<{width}} {text}\n")
