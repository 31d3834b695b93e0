"""Calibration that a caller holds: token windows or documents, in whatever Python keeps them."""

from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import BarberError
from .documents import of_field

LEGAL = "give a list of texts, a data set with a text field, or token windows (samples, length) of int64"
MOST = 1_000_000  # items of an iterator, which may have no end


def windows_or_documents(source: Any, field: str) -> Tensor | list[Any]:
    """Return token windows, (samples, length) int64 on the CPU, or documents.

    Args:
        source: tensor, array or rows of token ids; or texts, chat messages or objects in a list, iterator, data set,
            data frame or series.
        field: column of the data set, or name in an object, that holds documents or rows.

    Raises:
        BarberError: it is something else, it has no order or no end, or no such column.
    """
    if isinstance(source, str | bytes | bytearray | memoryview | PurePath):
        raise BarberError(f"calibration is one string or file, {type(source).__name__}: {LEGAL}")
    if isinstance(source, Set | Mapping):
        raise BarberError(f"calibration is a {type(source).__name__}, neither list nor windows: {LEGAL}")
    if isinstance(source, Tensor | np.ndarray):
        tokens = _numeric(source)
        if tokens is not None:
            return _windows(tokens)
    items = _items(_column(source, field), field)
    rows = [row for row in map(_row, items[:1]) if row is not None]
    return _joined_rows(items) if rows else items


def _numeric(array: Any) -> Tensor | None:
    """Return an array as a tensor, an integer one of any width as int64; None where it holds objects."""
    if isinstance(array, Tensor):
        return array
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(np.ascontiguousarray(array)) if array.dtype.kind in "bfc" else None


def _windows(tokens: Tensor) -> Tensor:
    integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    held = tokens.layout == torch.strided and not tokens.is_meta
    if tokens.ndim != 2 or not integers or not held or tokens.numel() == 0:
        raise BarberError(f"calibration {tokens.dtype} {tuple(tokens.shape)} is not legal: (samples, length) int64")
    return tokens.long().cpu()


def _column(source: Any, field: str) -> Iterable[Any]:
    """Return the column of a data set or frame that holds the text; what has no columns, as it is."""
    if hasattr(source, "take") and not hasattr(source, "__len__"):
        raise BarberError("calibration is a stream without a known end: give list(stream.take(1000))")
    names = getattr(source, "column_names", getattr(source, "columns", None))
    if names is None:
        return source  # type: ignore[no-any-return]
    if field not in names:
        raise BarberError(f"calibration has no column {field!r} (text_field): it has {', '.join(map(str, names))}")
    return source[field]  # type: ignore[no-any-return]


def _items(source: Iterable[Any], field: str) -> list[Any]:
    """Return all items, of objects the field."""
    try:
        items = list(islice(source, MOST + 1)) if isinstance(source, Iterator) else list(source)
    except TypeError:
        raise BarberError(f"calibration {type(source).__name__} is not legal: {LEGAL}") from None
    if isinstance(source, Iterator) and len(items) > MOST:
        raise BarberError(f"calibration yields more than {MOST:,} items: {LEGAL}")
    return [of_field(item, field) for item in items]


def _row(item: Any) -> list[int] | None:
    """Return the token ids that an item holds, (length,) or (1, length); None where it holds something else."""
    values = item.tolist() if isinstance(item, Tensor | np.ndarray) else item
    if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not isinstance(values, list | tuple) or not values or not all(map(_is_integer, values)):
        return None
    return list(map(int, values))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _joined_rows(items: list[Any]) -> Tensor:
    rows = [_row(item) for item in items]
    length = len(rows[0] or [])
    for number, row in enumerate(rows, 1):
        if row is None or len(row) != length:
            holds = "no token ids" if row is None else f"{len(row)} token ids"
            raise BarberError(f"calibration, item {number} holds {holds}, item 1 {length}: windows have one length")
    try:
        return torch.tensor(rows, dtype=torch.long)
    except (RuntimeError, ValueError, OverflowError):  # by its version, torch raises one of these
        raise BarberError("calibration has a token id beyond int64") from None
