"""Which model a checkpoint was made of, as its records tell."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..base.files import is_file
from .channel_order import read_order
from .experts import read_experts
from .names import EXPERTS_NAME, ORDER_NAME, SPARSITY_NAME, STRUCTURE_NAME
from .record import read_record
from .structure import read_structure

READERS: dict[str, Callable[[Path], Any]] = {  # by the file of a record
    SPARSITY_NAME: read_record, STRUCTURE_NAME: read_structure, EXPERTS_NAME: read_experts, ORDER_NAME: read_order,
}  # fmt: skip


def has_records(directory: Path) -> bool:
    """True if a directory holds a checkpoint that this program made of another one."""
    return any(is_file(directory / file) for file in READERS)


def read_if_there(directory: Path, file: str) -> Any:
    """Return one record of a checkpoint; None where it has none."""
    return READERS[file](directory) if (directory / file).is_file() else None


def recorded_base(directory: Path, files: Iterable[str] = tuple(READERS)) -> str | None:
    """Return the model that the first of these records names; None where there is none, or it was in memory."""
    for file in files:
        record = read_if_there(directory, file)
        if record is not None:
            name: str | None = record.base_model["name"]
            return name
    return None
