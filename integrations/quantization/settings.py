"""The settings of a quantization. Imports neither torch nor transformers."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from optimum_barber.base.errors import BarberError
from optimum_barber.base.fields import one_of

METHODS = ("gptq", "round-to-nearest", "aptq")
GPTQ_ALONE = {"damping", "sweeps", "block_size"}


class QuantizeSettings(BaseModel):
    """How a model's Linears are quantized; pruned weights stay exactly zero whatever is chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[str, one_of("method", METHODS)] = Field(
        "gptq",
        description="gptq makes up for each column's error in the columns behind; aptq does so by attention's output "
        "where that follows, and can mix bits; or round-to-nearest",
    )
    bits: Literal[2, 4, 8] = Field(4, description="of a weight, symmetric around zero: 2, 4 or 8")
    bits_of: dict[str, Literal[2, 4, 8]] = Field(
        default_factory=dict, description="other bits, by glob of a Linear's full name; the first that matches counts"
    )
    average_bits: float | None = Field(
        None,
        ge=2,
        le=8,
        description="aptq, instead of bits: largest mean over the weights of all quantized Linears; below 4 they get 2 "
        "or 4 bits, else 4 or 8, the most sensitive ones the more",
    )
    group_size: int | None = Field(
        128, description="consecutive inputs that share a scale, a divisor of every width; -1 or null: a whole row"
    )
    damping: float = Field(
        0.01, gt=0, allow_inf_nan=False, description="gptq: share of the Gram matrix's mean diagonal added to it"
    )
    sweeps: int = Field(
        2, ge=0, description="gptq: of coordinate descent over all columns afterwards; 0 leaves what GPTQ gives"
    )
    block_size: int = Field(128, ge=1, description="gptq: columns computed between two updates of all others")
    ignore: list[str] = Field(default_factory=list, description="Linears to leave as they are, by glob of full name")

    @field_validator("group_size")
    @classmethod
    def _whole_row(cls, size: int | None) -> int | None:
        if size is not None and size < 1 and size != -1:
            raise BarberError(f"group size {size} is not legal: from 1, or -1 for a whole row")
        return None if size == -1 else size

    @model_validator(mode="after")
    def _check_method(self) -> "QuantizeSettings":
        unused = self.model_fields_set & GPTQ_ALONE
        if unused and self.method == "round-to-nearest":
            raise BarberError(f"{min(unused)} goes with gptq and aptq, not with {self.method}")
        return self

    @model_validator(mode="after")
    def _check_bits(self) -> "QuantizeSettings":
        if self.average_bits is None:
            return self
        if self.method != "aptq":
            raise BarberError(f"average_bits {self.average_bits:g} goes with method aptq, not with {self.method}")
        if self.bits_of or "bits" in self.model_fields_set:
            raise BarberError(f"average_bits {self.average_bits:g} excludes bits and bits_of: it chooses them")
        return self

    @property
    def widths(self) -> tuple[int, int]:
        """The fewer and the more bits that a Linear can get under `average_bits`."""
        assert self.average_bits is not None
        return (2, 4) if self.average_bits < 4 else (4, 8)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that count, for a record."""
        unused = {"bits", "bits_of"} if self.average_bits is not None else set()
        return self.model_dump(exclude=unused)

    def bits_by_name(self, names: Iterable[str]) -> dict[str, int]:
        """Return the bits of every Linear by `bits` and `bits_of`."""
        chosen: dict[str, int] = {}
        for name in names:
            glob = self.glob_of(name)
            chosen[name] = self.bits if glob is None else self.bits_of[glob]
        return chosen

    def glob_of(self, name: str) -> str | None:
        """Return the glob of `bits_of` that decides the bits of a Linear."""
        return next((glob for glob in self.bits_of if fnmatchcase(name, glob)), None)

    def check_widths(self, widths: Mapping[str, int]) -> None:
        """Refuse a group size that does not divide the input width of every Linear.

        Raises:
            BarberError: names the first such Linear and all that would be legal.
        """
        size = self.group_size
        if size is None:
            return
        common = math.gcd(*widths.values())
        for name, width in widths.items():
            if width % size:
                divisors = [str(n) for n in range(1, common + 1) if common % n == 0]
                legal = ", ".join(["-1 (a whole row)", *divisors])
                raise BarberError(f"group size {size} does not divide the width {width} of {name}: legal are {legal}")
