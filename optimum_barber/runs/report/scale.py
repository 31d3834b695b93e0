"""Axes: from values to places, and where the ticks go."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .page import plainly

FINEST = (1, 2, 5)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool = False, zero: bool = False) -> "Scale":
        """The axis that holds all values; on a log axis those that are not positive have no place.

        Args:
            values: finite numbers.
            start: where the low end is drawn.
            end: where the high end is drawn.
            log: whether the axis is logarithmic.
            zero: whether a linear axis begins at 0.
        """
        held = [value for value in values if value > 0 or not log] or [1.0]
        low, high = min(held), max(held)
        if log:
            low, high = (low, high) if high > low * 1.05 else (low / 2, high * 2)
            return cls(low, high, start, end, True)
        low = min(low, 0.0) if zero else low
        high = high if high > low else low + (abs(low) or 1.0)
        return cls(low, high, start, end)

    def place(self, value: float) -> float:
        """Where a value is drawn; the low end for what a log axis cannot hold."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within the axis, about `most` of them; a log axis that spans little gets linear ones."""
        if self.log and self.high / self.low >= 8:
            return self._powers(most)
        rough = (self.high - self.low) / most
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (*FINEST, 10) if factor * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{step * count:.12g}") for count in range(first, last + 1)]

    def _powers(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        if last - first <= 2:
            found = [factor * 10.0**power for power in range(first, last + 1) for factor in FINEST]
        else:
            stride = max(math.ceil((last - first) / most), 1)
            found = [10.0**power for power in range(first, last + 1, stride)]
        return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]


def tick_label(value: float) -> str:
    """A short label: 10,000 and more, and less than a thousandth, as powers of ten."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, _, power = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return plainly(int(value)) if float(value).is_integer() else f"{value:g}"
