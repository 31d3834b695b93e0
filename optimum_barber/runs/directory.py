"""Output directories that hold a record of what wrote them: empty ones and those of the same kind may be written."""

import os
from pathlib import Path

from ..base.errors import BarberError
from ..base.output import LOCK_NAME


def check_directory(name: str, record: str, kind: str) -> Path:
    """Return the path of an output directory that is not there yet, is empty, or holds the file `record`.

    Raises:
        BarberError: it holds something that is no `kind`.
    """
    output = Path(name).expanduser().resolve()
    files = set(os.listdir(output)) - {LOCK_NAME} if output.is_dir() else set()
    if (files and record not in files) or output.is_file():
        raise BarberError(f"output {name} holds something that is no {kind}")
    return output


def open_directory(name: str, record: str, kind: str) -> Path:
    """Return the output directory, made if need be; raises BarberError as `check_directory`, or if it cannot be."""
    output = check_directory(name, record, kind)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BarberError(f"output {name} cannot be written: {error.strerror}") from None
    return output
