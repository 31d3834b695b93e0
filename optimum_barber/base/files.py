"""Single files: one reader of JSON, one writer that puts a file in place in one step, hashes, and tables."""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import BarberError, shown


def is_there(path: str | Path) -> bool:
    """True if the path names a file or folder; a name too long for one does not."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def is_file(path: str | Path) -> bool:
    """True if the path names a file; a name too long for one does not."""
    return is_there(path) and Path(path).is_file()


LARGEST_JSON = 2**25  # bytes; more than the header or index of any model takes, and parsed in less than a GiB
DEEPEST_JSON = 64  # objects and lists within each other
LONGEST_NAME = 255  # bytes
DIGITS = 40  # of an integer; tokenizers write 10**30 for a length without end


def parse_json(text: str | bytes, name: str | Path, kind: str = "JSON file") -> Any:
    """Parse JSON that a stranger may have written; `name` and `kind` are what the error calls it.

    Raises:
        BarberError: it is no JSON or no UTF-8, too large, nested too deeply, or has an integer or text that no other
            program would take.
    """
    if len(text) > LARGEST_JSON:
        raise BarberError(f"{name} is no {kind}: it is {len(text):,} bytes large, at most {LARGEST_JSON:,} are read")
    try:
        content = json.loads(text if isinstance(text, str) else text.decode(), parse_int=_integer)
        _check_values(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BarberError(f"{name} is no {kind}: {reason}") from None
    return content


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"integer {digits[:DIGITS]}... has {len(digits):,} digits, at most {DIGITS} are read")
    return int(digits)


def _check_values(content: Any) -> None:
    """Raise ValueError or RecursionError for what `parse_json` refuses beyond its syntax."""
    level = [content]
    for _ in range(DEEPEST_JSON):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair is no text
            elif isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
        level = inner
    if level:
        raise RecursionError


def read_json(path: Path, kind: str = "JSON file") -> Any:
    """Read a JSON file; `kind` is what the error calls it.

    Raises:
        BarberError: it cannot be read, or as `parse_json`.
    """
    try:
        with path.open("rb") as file:
            return parse_json(file.read(LARGEST_JSON + 1), path, kind)
    except OSError as error:
        raise BarberError(f"{path} cannot be read: {error.strerror}") from None


def read_json_object(path: Path, kind: str = "JSON object") -> dict[str, Any]:
    """Read a JSON file that must hold an object; see `read_json`.

    Raises:
        BarberError: as `read_json`, or it holds something else.
    """
    content = read_json(path, kind)
    if not isinstance(content, dict):
        raise BarberError(f"{path} is no {kind}: a JSON object is needed, not {type(content).__name__}")
    return content


def leads_out(path: Path) -> bool:
    """True if a symbolic link leads out of its directory, other than into the blobs of the hub's cache."""
    home, target = path.parent.resolve(), path.resolve().parent
    return target != home and target != home.parent.parent / "blobs"


def beside(record: Path, name: str, folder: str = "") -> Path:
    """Return the path of what a record names, which must lie in the record's own directory, or in `folder` there.

    Raises:
        BarberError: it lies elsewhere, by its name or by a symbolic link.
    """
    path = record.parent / folder / name
    plain = name not in ("", ".", "..") and os.path.basename(name) == name and len(name.encode()) <= LONGEST_NAME
    if not plain or "\0" in name or leads_out(path):
        raise BarberError(f"{record} names the file {shown(name)}: legal are files of its own directory")
    return path


def digest(content: Any) -> str:
    """Return the SHA-256 of anything that JSON can hold, keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def path_digest(name: str) -> str:
    """Return the SHA-256 of a file, or of a directory's names, sizes and times; any other name as it is."""
    path = Path(name)
    if is_there(path) and path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        return digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    if not is_file(path):
        return name
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BarberError(f"{path} cannot be read: {error.strerror}") from None


def write_file(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a file beside `path` and rename it, so that a reader sees the old content or the new, never half of it.

    Text is written as UTF-8. With `durable`, return only when content and name are on the disk.

    Raises:
        BarberError: the system refuses, which its cause tells; the old content is still there.
    """
    beside = path.with_name(path.name + ".partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with beside.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise BarberError(f"output {path} cannot be written: {error.strerror}") from error


def as_json(content: Any, indent: int | None = 2) -> str:
    """Return JSON text; a number that is not finite, for which JSON has no word, is null."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, with a trailing newline; see `as_json` and `write_file`."""
    write_file(path, as_json(content) + "\n")


def csv_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV, under a header; a column that a row lacks is empty there."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def markdown_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as a Markdown table, without a newline at its end; a column that a row lacks is empty there."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        cells = [str(row.get(column, "")) for column in columns]
        lines.append([cell.replace("|", "\\|").replace("\n", " ") for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_all(file: int, data: memoryview, position: int) -> None:
    """Write all of `data` at `position` of an open file; the system may take it in parts."""
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
