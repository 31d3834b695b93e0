"""A table of cells: each is computed once and kept as a JSON file with its fingerprint, which a later run reuses."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import BarberError
from ..base.files import read_json_object, write_json
from ..base.output import LOCK_NAME, wait_for
from ..base.ranks import ALONE, Ranks

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

    def fill(
        self, earlier: Mapping[str, Record], measure: Measure | None, tell: Teller, ranks: Ranks = ALONE
    ) -> dict[str, Record]:
        """Compute what is missing, cell by cell in order, and write each cell's file as soon as it is done.

        Several ranks take the cells in turn, once the first rank has measured the dense model.

        Args:
            earlier: records of an earlier run, by name; these cells are not computed again.
            measure: computes a cell from its name and the records so far; None if no cell is missing.
            tell: called in order with the name of each cell that is done, its record, and whether it is an earlier
                run's; on the first rank alone.

        Returns:
            All records on the first rank; on the others those that they needed.
        """
        missing = [name for name in self.fingerprints if name not in earlier]
        ranks.agree({"missing": missing})
        if ranks.first:
            for name in missing:
                self.path(name).unlink(missing_ok=True)  # from now on a file that is there is a cell that is done
        ranks.wait()
        work = _Filling(self, earlier, measure, tell, ranks)
        if DENSE in missing:
            missing.remove(DENSE)
            work.compute([DENSE] if ranks.first else [])
            ranks.wait()
        work.collect([DENSE])
        work.compute(missing[ranks.index :: ranks.count])
        ranks.wait()
        if ranks.first:
            work.collect(self.fingerprints)
            work.tell_done()
        return {name: work.records[name] for name in self.fingerprints if name in work.records}


class _Filling:
    """The work on a table: what is known, and which cells nobody was told of yet."""

    def __init__(
        self, table: CellTable, earlier: Mapping[str, Record], measure: Measure | None, tell: Teller, ranks: Ranks
    ) -> None:
        self.table, self.earlier, self.measure, self.tell = table, earlier, measure, tell
        self.records = dict(earlier)
        self.untold = list(table.fingerprints) if ranks.first else []
        self.tell_done()

    def compute(self, names: Sequence[str]) -> None:
        """Compute and write cells."""
        for name in names:
            assert self.measure is not None
            self.records[name] = self.measure(name, self.records)
            self.table.path(name).parent.mkdir(exist_ok=True)
            write_json(self.table.path(name), self.records[name])
            self.tell_done()

    def collect(self, names: Iterable[str]) -> None:
        """Read the cells that other ranks have done; a network file system may show them late."""
        for name in names:
            if name not in self.records:
                self.records[name] = read_json_object(wait_for(self.table.path(name)))

    def tell_done(self) -> None:
        """Tell of the cells that are done, up to the first one that is not."""
        while self.untold:
            name = self.untold[0]
            if name not in self.records and not self.table.path(name).is_file():
                return
            self.collect([name])
            self.tell(name, self.records[name], name in self.earlier)
            del self.untold[0]


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
