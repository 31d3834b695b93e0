"""A command on several devices: one process a device, as a launcher would start them on this machine."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from time import monotonic
from typing import Any

from ..base.errors import LostRankError
from ..base.launcher import environment_of

LEAVING = 20.0  # seconds that the other processes have to end after one has failed, or after an interrupt
INTERRUPTED = 130  # exit status


def run_on(devices: Sequence[str], settings: Mapping[str, Any], work: Callable[[dict[str, Any]], int]) -> int:
    """Run `work(settings)` as one rank a device; return 0, or the exit status of the first rank that failed.

    All processes end when one of them fails, and when this one is interrupted or ends.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = {}
    if "OMP_NUM_THREADS" not in os.environ:
        threads["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // len(devices), 1))
    context, processes = get_context("spawn"), list[BaseProcess]()
    with ended(processes):
        for rank, device in enumerate(devices):
            environment = threads | environment_of(rank, len(devices), store.port)
            process = context.Process(target=run_rank, args=(environment, work, {**settings, "device": device}))
            process.start()
            processes.append(process)
        return status_of(list(statuses(processes)))
    return INTERRUPTED


def run_rank(environment: Mapping[str, str], work: Callable[[dict[str, Any]], int], settings: dict[str, Any]) -> None:
    """Be one rank: do the work in the environment of a rank, and end with its exit status."""
    os.environ |= environment  # before torch is imported
    Thread(target=end_with_parent, daemon=True).start()
    sys.exit(work(settings))


def end_with_parent() -> None:
    """End this process when the one that started it has ended, however it did."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def statuses(processes: Sequence[BaseProcess]) -> Iterator[int]:
    """Yield the exit statuses of processes in the order in which they end; after a failure the others must hurry."""
    waiting: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
    deadline: float | None = None
    while waiting:
        left = None if deadline is None else max(deadline - monotonic(), 0.0)
        done = connection.wait(list(waiting), left)
        if not done:
            return
        for sentinel in done:
            process = waiting.pop(sentinel)
            process.join()
            yield process.exitcode or 0
            if process.exitcode and deadline is None:
                deadline = monotonic() + LEAVING


def status_of(ended_with: Sequence[int]) -> int:
    """Return the status of the first failure; a rank that only lost another one did not fail first."""
    failures = [status for status in ended_with if status]
    own = [status for status in failures if status != LostRankError.status]
    first = [*own, *failures, 0][0]
    return first if first >= 0 else 128 - first  # ended by a signal, as a shell tells it


@contextmanager
def ended(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """End the processes with the block; after an interrupt they end by themselves, and the first rank reports it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except KeyboardInterrupt:
        for process in processes:
            process.join(LEAVING / len(processes))
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
