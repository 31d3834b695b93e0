"""A command in several processes, started by torchrun or accelerate launch: one process group, one voice."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import Any

from ..base.errors import LostRankError

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = timedelta(seconds=3)  # a rank that knows what is wrong has said it by then
FAILURES, SAID = "failures", "said"


class Voice:
    """Tells the user what has failed: this process alone."""

    def say(self, text: str, error: BaseException | None = None) -> None:
        """Print the lines of a failure."""
        for line in text.splitlines() or [""]:
            sys.stderr.write(f"optimum-barber: {' '.join(line.split())}\n")


class SharedVoice(Voice):
    """The same for a rank: the first that fails speaks, the others leave it the time to do so.

    Args:
        store: that all ranks share.
    """

    def __init__(self, store: Any) -> None:
        self.store, self.failed = store, False

    def say(self, text: str, error: BaseException | None = None) -> None:
        """Print the lines, unless another rank has failed before, or says more of it."""
        self.failed = True
        if isinstance(error, LostRankError) and self._another_said():
            pass
        elif self.claim():
            super().say(text)
            sys.stderr.flush()
            self.note(SAID)
        else:
            self._another_said()

    def note(self, key: str) -> None:
        """Let the others know that this has happened, as far as they can be told."""
        try:
            self.store.add(key, 1)
        except RuntimeError:  # whoever held the store has ended
            return

    def claim(self) -> bool:
        """Whether this rank is the first that fails; also where nobody can be asked."""
        self.failed = True
        try:
            return int(self.store.add(FAILURES, 1)) == 1
        except RuntimeError:
            return True

    def _another_said(self) -> bool:
        try:
            self.store.wait([SAID], GRACE)
            return True
        except RuntimeError:
            return False


def several() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not several() or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[Voice]:
    """Inside, the processes of a launcher are ranks of a process group, of which only the first prints results."""
    if not several():
        yield Voice()
        return
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    voice = SharedVoice(PrefixStore("voice", store))
    dist.init_process_group("gloo", store=PrefixStore("ranks", store), rank=rank, world_size=count)
    try:
        with ExitStack() as stack:
            if not first():
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield voice
    except BaseException:  # nobody's bad input: its traceback says what it is
        voice.claim()
        voice.note(SAID)
        raise
    finally:
        if first() and voice.failed:  # this rank holds the store, in which the others look who has failed first
            wait_for_the_end_of(range(1, count))
        dist.destroy_process_group()


def wait_for_the_end_of(ranks: Iterable[int]) -> None:
    """Return when these ranks have ended, however slow they are: all that they send is the end of the connection."""
    import torch
    from torch import distributed as dist

    for rank in ranks:
        with suppress(RuntimeError):
            dist.recv(torch.empty(1), rank)


@contextmanager
def one_complaint() -> Iterator[None]:
    """Inside, where the command line is read, only the first process complains; the others leave it the time."""
    if first():
        yield
        return
    complaints = sys.stderr
    try:
        with open(os.devnull, "w") as sys.stderr:
            yield
    except SystemExit:
        time.sleep(GRACE.total_seconds())
        raise
    finally:
        sys.stderr = complaints
