"""A table of cells: each is computed once and kept as a JSON file with its fingerprint, which a later run reuses."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import BarberError
from ..base.files import read_json_object, write_json
from ..base.output import LOCK_NAME

DENSE = "dense"  # the cell of the unpruned model, the first of every table
Record = dict[str, Any]
Measure = Callable[[str, Mapping[str, Record]], Record]
Teller = Callable[[str, Record, bool], None]


def tell_nobody(name: str, record: Record, reused: bool) -> None:
    """Ignore the news of a cell."""


@dataclass
class CellTable:
    """The cells of a table as files in the directory `output`.

    `fingerprints` holds a digest of everything that a cell's figures follow from, by name, in the table's order.
    """

    output: Path
    fingerprints: dict[str, str]

    def path(self, name: str) -> Path:
        """Return the file of a cell."""
        return self.output / "cells" / f"{name}.json"

    def read(self, name: str) -> Record | None:
        """Return the record that an earlier run left of a cell; None if there is none or its fingerprint changed."""
        try:
            record = read_json_object(self.path(name))
        except BarberError:
            return None
        return record if record.get("fingerprint") == self.fingerprints[name] else None

    def read_all(self) -> dict[str, Record]:
        """Return the records that an earlier run left, by name, in order."""
        records = {}
        for name in self.fingerprints:
            record = self.read(name)
            if record is not None:
                records[name] = record
        return records

    def fill(self, earlier: Mapping[str, Record], measure: Measure | None, tell: Teller) -> dict[str, Record]:
        """Compute what is missing, cell by cell in order, and write each cell's file as soon as it is done.

        Args:
            earlier: records of an earlier run, by name; these cells are not computed again.
            measure: computes a cell from its name and all records so far; None if no cell is missing.
            tell: called after each cell with its name, its record, and whether it is an earlier run's.
        """
        records = dict(earlier)
        for name in self.fingerprints:
            if name not in records and measure is not None:
                records[name] = measure(name, records)
                self.path(name).parent.mkdir(exist_ok=True)
                write_json(self.path(name), records[name])
            tell(name, records[name], name in earlier)
        return {name: records[name] for name in self.fingerprints}


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
