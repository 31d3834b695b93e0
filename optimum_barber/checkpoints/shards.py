"""Safetensors files as the disk sees them: headers checked without reading a weight, tensors written in any order."""

import errno
import json
import math
import os
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from ..base.errors import BarberError, shown
from ..base.fields import one_line
from ..base.files import LARGEST_JSON, is_file, parse_json, sync_directory, write_all
from ..tensors.masks import raw_bytes

DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
    "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}  # safetensors lays tensors down in this order
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 24  # weights that are looked at or converted at once


@dataclass(frozen=True)
class Entry:
    """One tensor as a header has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors in their order on disk, and where their data starts."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    starts: dict[str, int]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors lie in safetensors files: the file of each tensor, and the metadata of each file.

    `index` is the content of the index file; None for a checkpoint of one file.
    """

    files: Mapping[str, str]
    metadata: Mapping[str, dict[str, str]]
    index: dict[str, Any] | None = None


def read_header(path: Path) -> Header:
    """Read and check a safetensors header; raises BarberError if the file is missing, damaged or of another format."""
    if not is_file(path):
        raise BarberError(f"{path.name} is missing in {path.parent}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LARGEST_JSON, size - 8):
                raise BarberError(f"{path.name} is truncated or no safetensors file: {size} bytes, header of {length}")
            text = file.read(length)
    except OSError as error:
        raise BarberError(f"{path.name} cannot be read: {error.strerror}") from None
    content = parse_json(text, path.name, "safetensors file: it has a broken header")
    try:
        return _checked_header(path.name, content, 8 + length, size)
    except ValidationError as error:
        raise BarberError(f"{path.name} has a broken header: {one_line(error)}") from None


class _Fields(BaseModel):
    """What a header says of one tensor."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_OBJECT = TypeAdapter(dict[str, Any])
_METADATA = TypeAdapter(dict[str, str])
_TENSORS = TypeAdapter(dict[str, _Fields])


def _checked_header(file: str, content: Any, position: int, size: int) -> Header:
    """Check the content of a header that ends at `position`: its tensors must fill the rest of the file."""
    tensors = _OBJECT.validate_python(content)
    header = Header({}, _METADATA.validate_python(tensors.pop("__metadata__", {})), {})
    first = position
    for name, fields in sorted(_TENSORS.validate_python(tensors).items(), key=lambda item: item[1].data_offsets):
        if fields.dtype not in DTYPES:
            legal = ", ".join(DTYPES)
            raise BarberError(f"{file} holds {name} in the dtype {shown(fields.dtype)}: known are {legal}")
        entry = Entry(DTYPES[fields.dtype], tuple(fields.shape))
        start, end = (first + offset for offset in fields.data_offsets)
        if start != position or end - position != entry.bytes:
            raise BarberError(f"{file} has a broken header: {name} does not lie where its shape has it")
        header.entries[name], header.starts[name] = entry, start
        position = end
    if position != size:
        raise BarberError(f"{file} is truncated or damaged: it has {size} bytes, its header says {position}")
    return header


class TensorFile:
    """A safetensors file of known tensors, each written at its place, in any order and as often as need be.

    The bytes are those that safetensors' own writer gives. Opened again, it goes on with the file that is there. Space
    for all of the file is taken at once; OSError is raised if the disk has no room.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        self.entries = dict(sorted(entries.items(), key=lambda item: (RANKS[item[1].dtype], item[0])))
        content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position, starts = 0, {}
        for name, entry in self.entries.items():
            starts[name], end = position, position + entry.bytes
            content[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        self._starts = {name: len(header) + start for name, start in starts.items()}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _reserve(self._file, len(header) + position)
        write_all(self._file, memoryview(header), 0)

    def write(self, name: str, tensor: Tensor) -> int:
        """Write one tensor, converted to the file's dtype piece by piece; the CRC-32 of what was written."""
        entry, position, checksum = self.entries[name], self._starts[name], 0
        assert tuple(tensor.shape) == entry.shape, (name, tensor.shape, entry.shape)
        for piece in tensor.detach().reshape(-1).split(CHUNK):
            data = raw_bytes(piece.to("cpu", entry.dtype))
            write_all(self._file, data, position)
            position, checksum = position + len(data), zlib.crc32(data, checksum)
        return checksum

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file, durably."""
        self.sync()
        os.close(self._file)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file, one tensor after the other, durably."""
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with closing(TensorFile(path, entries, metadata)) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


class OutputShards:
    """The safetensors files of an output, whose tensors are written one by one in any order, as in `TensorFile`.

    `checksums` takes the CRC-32 of every tensor that is written, by tensor name, by file name.
    """

    def __init__(
        self, directory: Path, layout: Layout, entries: Mapping[str, Entry], checksums: dict[str, dict[str, int]]
    ) -> None:
        self.files = layout.files
        self.checksums = checksums
        self.bytes = sum(entries[name].bytes for name in self.files)
        self._open: dict[str, TensorFile] = {}
        for file in sorted(set(self.files.values())):
            held = {name: entries[name] for name, home in self.files.items() if home == file}
            self._open[file] = TensorFile(directory / file, held, layout.metadata[file])
        for folder in (directory, directory.parent):
            sync_directory(folder)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor into its file and keep its checksum."""
        file = self.files[name]
        self.checksums.setdefault(file, {})[name] = self._open[file].write(name, tensor)

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        for file in self._open.values():
            file.sync()

    def __enter__(self) -> "OutputShards":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()


def damaged(path: Path, checksums: Mapping[str, int]) -> str | None:
    """The first tensor of a file whose CRC-32 is not that of `checksums`; None if all are. Raises as `read_header`."""
    header = read_header(path)
    with path.open("rb") as file:
        for name, expected in checksums.items():
            file.seek(header.starts[name])
            if _checksum(file, header.entries[name].bytes) != expected:
                return name
    return None


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size > 0:
        data = file.read(min(size, CHUNK))
        size, checksum = size - len(data), zlib.crc32(data, checksum)
    return checksum


def read_ahead(path: Path, start: int, size: int) -> None:
    """Have the system read a part of a file that will be needed soon, where it can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def _reserve(file: int, size: int) -> None:
    """Take the space of a file, so that a full disk is known at once; only its length where that cannot be done."""
    if os.fstat(file).st_size != size:
        os.ftruncate(file, size)
    if not hasattr(os, "posix_fallocate"):  # as on macOS
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
