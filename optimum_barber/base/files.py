"""Reading and writing single files: JSON, text, bytes; whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import BarberError


def is_there(path: Path) -> bool:
    """Whether the path names a file or folder; a name too long for one does not."""
    try:
        return path.exists()
    except OSError:
        return False


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        BarberError: it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BarberError(f"{path} cannot be read: {error}") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON with a trailing newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_durably(path: Path, text: str) -> None:
    """Put a file in place in one step, on the disk when this returns."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_directory(path.parent)


def write_all(file: int, data: memoryview, position: int) -> None:
    """Write all of `data` at `position`; the system may take it in parts."""
    while len(data):
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def sync_directory(directory: Path) -> None:
    """Return when the names of a directory's files are on the disk."""
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
