"""Progress bars: one switch for those of all libraries."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.std import tqdm


@contextmanager
def hidden_bars(quiet: bool = False) -> Iterator[None]:
    """Show no bar of any library inside the block, if it is to be quiet or standard error is no terminal.

    All libraries here draw with tqdm, mostly by classes of their own, and some have no switch.
    """
    begin = tqdm.__init__

    def begin_hidden(self: Any, *values: Any, **options: Any) -> None:
        begin(self, *values, **{**options, "disable": True})

    if quiet or not sys.stderr.isatty():
        tqdm.__init__ = begin_hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = begin  # type: ignore[method-assign]
