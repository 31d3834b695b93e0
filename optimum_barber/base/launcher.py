"""The variables by which a launcher (torchrun, accelerate launch, our own commands) tells a process its rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

RANK, RANKS = "RANK", "WORLD_SIZE"
LOCAL_RANK, LOCAL_RANKS = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torch's own name: whoever starts the ranks holds their store
NEEDED = (RANK, RANKS, ADDRESS, PORT)  # to find the other ranks
SEEN_BY_ACCELERATE = (RANK, LOCAL_RANK, RANKS)


def launched_several() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in NEEDED) and int(os.environ[RANKS]) > 1


def launched_first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not launched_several() or os.environ[RANK] == "0"


def local_rank() -> int | None:
    """Return the number of this process on its machine, from 0; None without a launcher."""
    number = os.environ.get(LOCAL_RANK)
    return None if number is None else int(number)


def holds_store() -> bool:
    """Whether this process, and not the launcher, holds the store of all ranks."""
    return launched_first() and os.environ.get(AGENT_STORE) != "True"


def environment_of(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables of a rank, where all are on this machine and whoever starts them holds their store."""
    values = {RANK: rank, LOCAL_RANK: rank, RANKS: count, LOCAL_RANKS: count, ADDRESS: "127.0.0.1", PORT: port}
    return {AGENT_STORE: "True"} | {name: str(value) for name, value in values.items()}


@contextmanager
def hidden_launcher() -> Iterator[bool]:
    """Inside, accelerate sees no launcher; yields whether there is one."""
    variables = {}
    for name in SEEN_BY_ACCELERATE:
        if name in os.environ:
            variables[name] = os.environ.pop(name)
    try:
        yield bool(variables)
    finally:
        os.environ |= variables
