"""The files of a recipe's run: a record of the run, a record of every stage."""

from pathlib import Path
from typing import Any

from ...base.files import read_json_object

RUN_NAME = "run.json"
STAGE_NAME = "stage.json"
MODEL = "model"  # the folder of a stage's directory that holds the model, or the adapter, that it made


def read_stage(directory: Path) -> dict[str, Any]:
    """Return the record of a stage: kind, fingerprint, figures; empty where it is not done.

    Raises:
        BarberError: the record is broken.
    """
    path = directory / STAGE_NAME
    return read_json_object(path) if path.is_file() else {}
