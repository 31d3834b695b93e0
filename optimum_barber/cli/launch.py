"""A command in several processes, started by torchrun or accelerate launch: one process group, one voice."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any

from ..base.errors import LostRankError
from ..base.launcher import holds_store, launched_first, launched_several

GRACE = timedelta(seconds=3)  # a rank that knows what is wrong has printed it by then
FAILURES, PRINTED = "failures", "printed"


class Voice:
    """Prints the failure of a command; where ranks share a store, only the first that fails prints.

    Args:
        store: key-value store of all ranks; None for a process on its own.
    """

    def __init__(self, store: Any = None) -> None:
        self.store, self.failed = store, False

    def say(self, text: str, error: BaseException | None = None) -> None:
        """Print the lines, unless another rank failed before or knows the cause of a `LostRankError`."""
        self.failed = True
        if isinstance(error, LostRankError) and self._other_printed():
            return
        if not self.claim():
            self._other_printed()
            return
        for line in text.splitlines() or [""]:
            sys.stderr.write(f"optimum-barber: {' '.join(line.split())}\n")
        sys.stderr.flush()
        self.note_printed()

    def claim(self) -> bool:
        """Whether this rank is the first that fails; also where the store has gone with its rank."""
        self.failed = True
        if self.store is None:
            return True
        try:
            return int(self.store.add(FAILURES, 1)) == 1
        except RuntimeError:
            return True

    def note_printed(self) -> None:
        """Let the other ranks know, as far as they can be told."""
        if self.store is not None:
            with suppress(RuntimeError):  # the rank that held the store has ended
                self.store.add(PRINTED, 1)

    def _other_printed(self) -> bool:
        if self.store is None:
            return False
        try:
            self.store.wait([PRINTED], GRACE)
            return True
        except RuntimeError:
            return False


@contextmanager
def joined() -> Iterator[Voice]:
    """Make the processes of a launcher ranks of a process group, of which only the first prints results."""
    if not launched_several():
        yield Voice()
        return
    import torch
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from ..base.ranks import RankGroup

    store, rank, count = next(rendezvous("env://"))
    voice = Voice(PrefixStore("voice", store))
    dist.init_process_group("gloo", store=PrefixStore("ranks", store), rank=rank, world_size=count)
    try:
        with ExitStack() as stack:
            if not launched_first():
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield voice
    except BaseException:  # an unexpected error: its traceback says what it is
        voice.claim()
        voice.note_printed()
        raise
    finally:
        for group in list(RankGroup.open):  # ranks that wait for this one would wait for ever
            group.close()
        if holds_store() and voice.failed:  # in which the others look who has failed first
            for other in range(1, count):
                with suppress(RuntimeError):  # all that an ending rank sends is the end of the connection
                    dist.recv(torch.empty(1), other)
        dist.destroy_process_group()


@contextmanager
def one_complaint() -> Iterator[None]:
    """Let only the first process complain about the command line; the others leave it the time to do so."""
    if launched_first():
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    except SystemExit:
        time.sleep(GRACE.total_seconds())
        raise
