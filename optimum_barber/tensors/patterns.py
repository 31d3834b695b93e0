"""Sparsity patterns: unstructured at any ratio, or N:M along the input dimension."""

import re
from dataclasses import dataclass
from fractions import Fraction

from ..base.errors import BarberError, shown


@dataclass(frozen=True)
class SparsityPattern:
    """How many weights a keep mask prunes, and within what.

    Attributes:
        sparsity: share of weights pruned, in (0, 1).
        keep: N of N:M, the weights kept in every group; 0 for an unstructured pattern.
        group: M of N:M, consecutive weights along the input dimension; 0 for an unstructured pattern.
        whole: floor(ratio * n) is pruned of a Linear as a whole, whose rows may differ by one, not of every group.
    """

    sparsity: float
    keep: int = 0
    group: int = 0
    whole: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise BarberError(f"sparsity {self.sparsity} is outside the open interval (0, 1)")

    @classmethod
    def parse(cls, pattern: str | None, sparsity: float | None) -> "SparsityPattern":
        """The pattern meant by `--pattern` and `--sparsity`; N:M implies the sparsity 1 - N/M.

        Raises:
            BarberError: neither is given, `pattern` is not N:M with 0 < N < M, or `sparsity` contradicts it.
        """
        if pattern in (None, "unstructured"):
            if sparsity is None:
                raise BarberError("sparsity is missing: give a number in (0, 1), or a pattern such as 2:4")
            return cls(sparsity)
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", pattern)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise BarberError(
                f"pattern {shown(pattern)} is not legal: 'unstructured' or N:M with 0 < N < M, such as 2:4"
            )
        keep, group = int(match[1]), int(match[2])
        implied = 1 - keep / group
        if sparsity is not None and abs(sparsity - implied) > 1e-9:
            raise BarberError(f"sparsity {sparsity} contradicts pattern {pattern}, which implies {implied:g}")
        return cls(implied, keep, group)

    @classmethod
    def of_count(cls, count: int, weights: int) -> "SparsityPattern":
        """The unstructured pattern that prunes exactly `count` of the `weights` of a Linear."""
        middle = (count + 0.5) / weights  # of the ratios with that floor: no rounding hurts
        return cls(middle, whole=True)

    @property
    def semi_structured(self) -> bool:
        """Whether this is an N:M pattern."""
        return self.group > 0

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.semi_structured else "unstructured"

    def pruned(self, count: int) -> int:
        """How many of a comparison group of `count` weights are pruned: floor(ratio * count)."""
        if self.semi_structured:
            return count * (self.group - self.keep) // self.group
        return int(Fraction(str(self.sparsity)) * count)  # as written: 0.7 * 10 is 6.999... in binary

    def pruned_of(self, groups: int, size: int) -> tuple[int, int]:
        """Of a Linear of `groups` comparison groups of `size` weights: how many of each, how many groups one more."""
        return divmod(self.pruned(groups * size), groups) if self.whole else (self.pruned(size), 0)

    def pruned_between(self, start: int, end: int) -> int:
        """How many of the weights from `start` to `end` of a Linear, where they are one of its comparison groups."""
        return self.pruned(end) - self.pruned(start) if self.whole else self.pruned(end - start)

    def check_width(self, name: str, width: int) -> None:
        """Refuse the Linear `name` if its input width is not a multiple of M."""
        if self.semi_structured and width % self.group:
            raise BarberError(f"pattern {self} does not fit {name}: its width {width} is no multiple of {self.group}")
