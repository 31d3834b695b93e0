"""The budget of an unstructured sparsity: shares of blocks as exact counts of Linears, and the split of least error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ..base.errors import BarberError
from .patterns import SparsityPattern

Sizes = Mapping[str, Mapping[str, int]]
TOLERANCE = 1e-4  # how far shares may be off the target together; what they are off is spread evenly
BISECTIONS = 200  # more than a float64 has bits
FLATTEST = 1e-6  # least slope of a log error: an error that does not rise is as good as none


@dataclass
class Shares:
    """The sparsity of each block, as an allocation shares it out.

    Attributes:
        sparsity: share of the prunable weights of each block that is pruned, in (0, 1), by name.
        basis: what it was concluded from, by block or layer, for `report.json`.
    """

    sparsity: dict[str, float]
    basis: dict[str, Any] = field(default_factory=dict)


def patterns_of(shares: Mapping[str, float], sizes: Sizes, target: float) -> dict[str, SparsityPattern]:
    """The pattern of every block and Linear, by name; none where all blocks have the target itself (see `quotas`)."""
    if all(share == target for share in shares.values()):
        return {}
    patterns = {name: SparsityPattern(share) for name, share in shares.items()}
    counts = quotas(shares, sizes, target)
    for linears in sizes.values():
        for name, weights in linears.items():
            patterns[name] = SparsityPattern.of_count(counts[name], weights)
    return patterns


def quotas(shares: Mapping[str, float], sizes: Sizes, target: float) -> dict[str, int]:
    """How many weights each Linear has pruned: floor(target * n) of all n together, to the weight.

    A Linear of w weights deserves (share + d) * w, where d, the same for all, makes the sum exact. It gets the floor of
    that; what is left goes, one weight each, to those with the largest fractions, among equals to the first.

    Args:
        shares: sparsity of each block, which come to the target together but for rounding.
        sizes: weights of each Linear of each block.
        target: share of all weights to prune, in (0, 1), as written in decimals.

    Raises:
        BarberError: the shares do not come to the target.
    """
    total, shared = 0, Fraction()
    for block, linears in sizes.items():
        weights = sum(linears.values())
        total += weights
        shared += Fraction(shares[block]) * weights
    if abs(shared / total - Fraction(target)) > TOLERANCE:
        raise BarberError(f"the allocation's shares come to sparsity {float(shared / total):.4f}, expected {target:g}")
    expected = math.floor(Fraction(str(target)) * total)
    shift = (expected - shared) / total
    counts, fractions = dict[str, int](), dict[str, Fraction]()
    for block, linears in sizes.items():
        for name, weights in linears.items():
            due = (Fraction(shares[block]) + shift) * weights
            counts[name] = math.floor(due)
            fractions[name] = due - counts[name]
    largest_first = sorted(fractions, key=fractions.__getitem__, reverse=True)
    for name in largest_first[: expected - sum(counts.values())]:
        counts[name] += 1
    return counts


@dataclass(frozen=True)
class ErrorCurve:
    """The error of a block by its sparsity s: e(s) = exp(level + slope * s), convex and rising: slope > 0."""

    level: float
    slope: float

    @classmethod
    def through(cls, sparsities: Sequence[float], errors: Sequence[float]) -> "ErrorCurve":
        """The line of least squares through the logarithms of measured errors >= 0; almost flat where it would fall."""
        logs = [math.log(max(error, 1e-30)) for error in errors]
        center, middle = sum(sparsities) / len(logs), sum(logs) / len(logs)
        covariance = sum((s - center) * (y - middle) for s, y in zip(sparsities, logs, strict=True))
        slope = max(covariance / (sum((s - center) ** 2 for s in sparsities) or 1.0), FLATTEST)
        return cls(middle - slope * center, slope)

    def __call__(self, sparsity: float) -> float:
        """The predicted error."""
        return math.exp(self.level + self.slope * sparsity)

    def where(self, log_price: float, weights: int) -> float:
        """The sparsity at which one weight more costs exp(log_price): e'(s) = exp(log_price) * weights."""
        return (log_price + math.log(weights) - math.log(self.slope) - self.level) / self.slope


def least_error(
    curves: Sequence[ErrorCurve], weights: Sequence[int], target: float, lowest: float, highest: float
) -> list[float]:
    """The sparsities s_b of blocks with the least sum of errors e_b(s_b) at a total sparsity.

    Minimises sum_b e_b(s_b) subject to sum_b n_b s_b = target * sum_b n_b and lowest <= s_b <= highest, n_b the
    prunable weights of block b. As e_b is convex, s_b = clip(e_b'^-1(p n_b), lowest, highest) at the one price p of a
    weight that meets the total, which rises with p: bisection of log p.
    """

    blocks = list(zip(curves, weights, strict=True))

    def split(log_price: float) -> list[float]:
        return [min(max(curve.where(log_price, count), lowest), highest) for curve, count in blocks]

    prices = []
    for curve, count in blocks:
        for sparsity in (lowest, highest):
            prices.append(curve.level + curve.slope * sparsity + math.log(curve.slope / count))
    low, high, expected = min(prices), max(prices), target * sum(weights)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if sum(s * count for s, count in zip(split(middle), weights, strict=True)) < expected:
            low = middle
        else:
            high = middle
    return split(high)
