"""What a stranger's model may say of itself before memory is taken: sizes in a config, lengths in a GGUF file."""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..base.errors import BarberError, shown

LARGEST_COUNT = 2**16  # of layers, heads, experts
LARGEST_SIZE = 2**31  # of a dimension
COUNTED = re.compile(r"^(num|n)_.*(layer|head|expert)|(layer|head|expert)s$|group")  # names
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # the configurations' names
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's types
TEXT, ARRAY = 8, 9  # the other two of GGUF's types
LARGEST_ARRAYS = 2**22  # values in all arrays of a GGUF file; its reader makes an object of each
LARGEST_DIMENSIONS = 4


def check_numbers(model: str, config: Mapping[Any, Any]) -> None:
    """Refuse a configuration with NaN, or a count or dimension that no model has."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(model, value)
        elif isinstance(value, float) and math.isnan(value):
            raise BarberError(f"model {model!r}: {key} is NaN in config.json")
        elif isinstance(value, int):
            limit = LARGEST_COUNT if COUNTED.search(str(key)) else LARGEST_SIZE
            if value > limit and not str(key).endswith(("_id", "length")):
                raise BarberError(f"model {model!r}: {key} is {shown(value)} in config.json, at most {limit} is legal")


def check_experts(model: str, config: Any) -> None:
    """Refuse a configuration with fewer experts than the router picks; with one, an MLP has no router."""
    text = config.get_text_config()
    experts, chosen = first_setting(text, EXPERTS), first_setting(text, EXPERTS_PER_TOKEN)
    if 1 < experts < chosen:
        raise BarberError(f"model {model!r} has {experts} experts, and its router picks {chosen} for a token")


def first_setting(config: Any, names: Sequence[str]) -> int:
    """Return the first of these settings that a configuration has, a number; 1 without any."""
    for name in names:
        value = getattr(config, name, None)
        if value and isinstance(value, int):
            return value
    return 1


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose header is damaged, or says more than the file holds."""
    stat = path.stat()
    _check_gguf(path, stat.st_size, stat.st_mtime_ns)


@cache
def _check_gguf(path: Path, size: int, _: int) -> None:
    try:
        if size == 0:
            raise ValueError("it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except OSError as error:
        raise BarberError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, struct.error) as error:
        raise BarberError(f"{path.name} is truncated, damaged or no GGUF file: {error}") from None


class _Header:
    """A walk over the header of a GGUF file; raises ValueError or struct.error where it leads out of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.order, self.values = data, 4, "<", 0

    def check(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = self._numbers("I")
        if not version & 0xFFFF:
            self.order = ">"
        tensors, fields = self._numbers("QQ")
        for _ in self._times(fields):
            self._text()
            self._value(*self._numbers("I"))
        for _ in self._times(tensors):
            self._tensor()

    def _numbers(self, kinds: str) -> tuple[int, ...]:
        form = struct.Struct(self.order + kinds)
        self.place += form.size
        return form.unpack_from(self.data, self.place - form.size)

    def _times(self, count: int, size: int = 8) -> Iterator[int]:
        """So many values of at least `size` bytes, if the rest of the file may hold them."""
        if count * size > len(self.data) - self.place:
            raise ValueError(f"{count} values at byte {self.place} are more than it holds")
        return iter(range(count))

    def _skip(self, count: int, size: int) -> None:
        self._times(count, size)
        self.place += count * size

    def _text(self) -> None:
        (length,) = self._numbers("Q")
        self._skip(length, 1)

    def _value(self, kind: int) -> None:
        if kind == TEXT:
            self._text()
        elif kind == ARRAY:
            self._array(*self._numbers("IQ"))
        elif kind in SCALARS:
            self._skip(1, SCALARS[kind])
        else:
            raise ValueError(f"type {kind} at byte {self.place} is unknown")

    def _array(self, kind: int, count: int) -> None:
        self.values += count
        if self.values > LARGEST_ARRAYS:
            raise ValueError(f"its arrays have more than {LARGEST_ARRAYS:,} values")
        if kind == TEXT:
            for _ in self._times(count):
                self._text()
        elif kind in SCALARS:
            self._skip(count, SCALARS[kind])
        else:
            raise ValueError(f"an array of type {kind} at byte {self.place} is not legal")

    def _tensor(self) -> None:
        self._text()
        (count,) = self._numbers("I")
        if count > LARGEST_DIMENSIONS:
            raise ValueError(f"a tensor of {count} dimensions at byte {self.place} is not legal")
        weights = math.prod(self._numbers("Q" * count))
        self._times(weights // 8, 1)  # no type takes less than a bit a weight
        self._numbers("IQ")
