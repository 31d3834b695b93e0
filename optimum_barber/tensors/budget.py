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
    """What an allocation gives.

    Attributes:
        sparsity: share of the prunable weights of each block that is pruned, in (0, 1), by name.
        found: what it was concluded from, by block or layer, for `report.json`.
    """

    sparsity: dict[str, float]
    found: dict[str, Any] = field(default_factory=dict)


def patterns_of(shares: Mapping[str, float], sizes: Sizes, target: float) -> dict[str, SparsityPattern]:
    """The pattern of every block and Linear, by name; none where all blocks have the target itself.

    Args:
        shares: sparsity of each block.
        sizes: weights of each Linear of each block.
        target: share of all weights to prune.
    """
    if all(share == target for share in shares.values()):
        return {}
    counts = quotas(shares, sizes, target)
    weights = {name: count for linears in sizes.values() for name, count in linears.items()}
    blocks = {name: SparsityPattern(share) for name, share in shares.items()}
    return blocks | {name: SparsityPattern.of_count(count, weights[name]) for name, count in counts.items()}


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
    total = sum(sum(linears.values()) for linears in sizes.values())
    asked = math.floor(Fraction(str(target)) * total)
    given = sum((Fraction(shares[block]) * sum(linears.values()) for block, linears in sizes.items()), Fraction())
    if abs(given / total - Fraction(target)) > TOLERANCE:
        raise BarberError(f"the allocation's shares come to sparsity {float(given / total):.4f}, expected {target:g}")
    shift = (asked - given) / total
    due = {n: (Fraction(shares[block]) + shift) * w for block, linears in sizes.items() for n, w in linears.items()}
    counts = {name: math.floor(exact) for name, exact in due.items()}
    first = sorted(due, key=lambda name: counts[name] - due[name])[: asked - sum(counts.values())]
    return {name: count + (name in first) for name, count in counts.items()}


@dataclass(frozen=True)
class ErrorCurve:
    """The error of a block by its sparsity s: e(s) = exp(level + slope * s), convex and rising.

    Attributes:
        level: log of the error at s = 0, as the line has it.
        slope: of the log error, above 0.
    """

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

    Minimises sum_b e_b(s_b) subject to sum_b n_b s_b = target * sum_b n_b and lowest <= s_b <= highest. As e_b is
    convex, s_b = clip(e_b'^-1(p n_b), lowest, highest) at the one price p of a weight that meets the total, which
    rises with p: bisection of log p.

    Args:
        curves: e_b of each block.
        weights: n_b, prunable weights of each block, above 0.
        target: in [lowest, highest].
        lowest: of every block's sparsity.
        highest: of every block's sparsity.
    """

    def split(log_price: float) -> list[float]:
        pairs = zip(curves, weights, strict=True)
        return [min(max(curve.where(log_price, count), lowest), highest) for curve, count in pairs]

    prices = [
        curve.level + curve.slope * s + math.log(curve.slope / count)
        for curve, count in zip(curves, weights, strict=True)
        for s in (lowest, highest)
    ]
    low, high, asked = min(prices), max(prices), target * sum(weights)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        reached = sum(s * count for s, count in zip(split(middle), weights, strict=True))
        low, high = (middle, high) if reached < asked else (low, middle)
    return split(high)
