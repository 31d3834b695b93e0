"""The directory of a run: one run at a time in it, a record of the run, a record of every stage."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..artifacts import write_json
from ..errors import BarberError

RUN_NAME = "run.json"
STAGE_NAME = "stage.json"
LOCK = ".lock"


def open_output(name: str) -> Path:
    """The output directory, made if need be.

    Raises:
        BarberError: it holds something that is no run, or cannot be written.
    """
    output = Path(name).expanduser().resolve()
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if (output.exists() and not output.is_dir()) or (held - {LOCK} and RUN_NAME not in held):
        raise BarberError(f"output {name} holds something that is no run of a recipe")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BarberError(f"output {name} cannot be written: {error.strerror}") from None
    return output


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Inside, no other run works in the output.

    Raises:
        BarberError: another one does.
    """
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BarberError(f"output {output} is being written by another run") from None
    try:
        yield
    finally:
        lock.release()


def read_stage(directory: Path) -> dict[str, Any]:
    """What a stage left on record: kind, fingerprint, figures; empty where it is not done."""
    path = directory / STAGE_NAME
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def now() -> str:
    """The time in UTC, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_run(output: Path, content: Mapping[str, Any]) -> None:
    """Write `run.json` beside and put it in place."""
    beside = output / (RUN_NAME + ".partial")
    write_json(beside, content)
    beside.replace(output / RUN_NAME)
