"""The directory of a run: one run at a time in it, a record of the run, a record of every stage."""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...base.errors import BarberError
from ...base.files import write_json
from ...base.output import LOCK_NAME

RUN_NAME = "run.json"
STAGE_NAME = "stage.json"


def check_output(name: str, record: str = RUN_NAME, what: str = "run of a recipe") -> Path:
    """The path of an output directory that is not there yet, or is one of ours.

    Args:
        name: of the directory.
        record: the file that tells a directory of ours.
        what: it holds, for the error.

    Raises:
        BarberError: it holds something else.
    """
    output = Path(name).expanduser().resolve()
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if (output.exists() and not output.is_dir()) or (held - {LOCK_NAME} and record not in held):
        raise BarberError(f"output {name} holds something that is no {what}")
    return output


def open_output(name: str, record: str = RUN_NAME, what: str = "run of a recipe") -> Path:
    """The output directory, made if need be; see `check_output`.

    Raises:
        BarberError: it holds something else, or cannot be written.
    """
    output = check_output(name, record, what)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BarberError(f"output {name} cannot be written: {error.strerror}") from None
    return output


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
    write_json(output / RUN_NAME, content)
