"""LLM-Barber's exchange of pruned against kept weights (METHODS: LLM-Barber, steps 4 to 6). Torch only.

In every group the pruned weights, most important first, are paired with the kept weights, least
important first; pair i is worth S_grow(i) - S_prune(i), which falls with i. N+ pairs are worth more
than zero, and an exchange at the ratio alpha swaps the first floor(alpha * N+) of them (Eq. 9-11).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import count_true, fill_up
from .order import extremes, kth_smallest


def to_groups(tensors: Sequence[Tensor], granularity: str) -> list[Tensor]:
    """The comparison groups of a block's (out, in) tensors, as matrices whose rows are groups.

    `block`: all Linears in one row; `layer`: one row a Linear; `input`: a row for each of its columns;
    `output`: a row for each of its rows.
    """
    if granularity == "block":
        return [torch.cat([tensor.reshape(-1) for tensor in tensors])[None]]
    if granularity == "layer":
        return [tensor.reshape(1, -1) for tensor in tensors]
    return [tensor.t() if granularity == "input" else tensor for tensor in tensors]


def from_groups(groups: Sequence[Tensor], shapes: Sequence[torch.Size], granularity: str) -> list[Tensor]:
    """The inverse of `to_groups`."""
    if granularity == "block":
        parts = groups[0][0].split([shape.numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    if granularity == "input":
        return [group.t().contiguous() for group in groups]
    return [group.reshape(shape) for group, shape in zip(groups, shapes, strict=True)]


def positive_pairs(importance: Tensor, keep: Tensor) -> Tensor:
    """N+ of each group, without pairing anything.

    With K weights kept in the group and t the K-th largest importance of all its weights, pair k is
    worth more than zero as long as a threshold fits between its members; so
    N+ = max(#{pruned, S > t}, #{kept, S < t}). The two differ only by ties at t.

    Args:
        importance: (groups, width), >= 0.
        keep: (groups, width) bool.

    Returns:
        (groups,) int64.
    """
    kept = count_true(keep)
    cut = _largest_at(importance, kept)
    grown = count_true((importance > cut) & ~keep)
    lost = count_true((importance < cut) & keep)
    return torch.maximum(grown, lost).masked_fill_(kept == 0, 0)


def _largest_at(values: Tensor, counts: Tensor) -> Tensor:
    """The counts-th largest value of each row, (rows, 1); a selection where all counts agree, else a sort."""
    width, first = values.shape[1], int(counts[0])
    if len(values) == 1:
        return kth_smallest(values[0], width - max(first, 1) + 1).reshape(1, 1)
    if bool((counts == first).all()):
        return values.kthvalue(width - max(first, 1) + 1, dim=1, keepdim=True).values
    ascending = values.sort(dim=1).values
    return ascending.gather(1, (width - counts.clamp(min=1))[:, None])


def swap_counts(positive: Tensor, ratio: float) -> Tensor:
    """floor(ratio * N+) of each group, (groups,) int64; a product that is whole but for rounding is whole."""
    exact = positive.double() * ratio
    return (exact + exact * 1e-14 + 1e-9).floor().long()


class Extremes:
    """The highest or lowest candidates of each row, ranked once and taken in any number up to `most`."""

    def __init__(self, scores: Tensor, candidates: Tensor, most: int, largest: bool) -> None:
        self.scores, self.candidates, self.largest = scores, candidates, largest
        self.void = -torch.inf if largest else torch.inf
        if scores.shape[0] == 1:  # half the memory and time of masking, and one row needs no alignment
            self.ranked = extremes(scores[0], candidates[0], most, largest)[None]
        else:
            masked = scores.masked_fill(~candidates, self.void)
            self.ranked = masked.topk(most, dim=1, largest=largest).values

    def take(self, counts: Tensor) -> Tensor:
        """The first `counts` (rows,) of each row as a bool tensor; ties fall to the lower index."""
        if self.ranked.shape[1] == 0:
            return torch.zeros_like(self.candidates)
        cut = self.ranked.gather(1, (counts - 1).clamp(min=0)[:, None])
        cut = cut.masked_fill((counts == 0)[:, None], -self.void)
        beyond = self.scores > cut if self.largest else self.scores < cut
        chosen = beyond.logical_and_(self.candidates)
        tied = (self.scores == cut).logical_and_(self.candidates)
        return fill_up(chosen, tied, counts[:, None])


class Ranking(ABC):
    """All swaps that a block's importance offers, ranked once and applied at any ratio.

    Attributes:
        positive: N+ of each group, one (groups,) int64 tensor for every matrix of groups.
    """

    positive: list[Tensor]

    @property
    def pairs(self) -> int:
        """N+ summed over all groups."""
        return sum(int(positive.sum()) for positive in self.positive)

    def most(self, ratio: float) -> list[int]:
        """The largest number of swaps in any group at this ratio, for every matrix of groups."""
        return [int(swap_counts(positive, ratio).max()) for positive in self.positive]

    @abstractmethod
    def values(self) -> Tensor:
        """The ranked pair values, best first within a group; those of groups with fewer pairs end in 0 or below."""

    def outlier_share(self) -> float:
        """The share of the worthwhile pairs whose value lies above the upper Tukey fence, Q3 + 1.5 (Q3 - Q1).

        The paper (IV-C, Fig. 3) finds the ratio that is worth taking among these outliers.
        """
        values = self.values().reshape(-1)
        values = values[torch.isfinite(values) & (values > 0)].sort(descending=True).values
        if len(values) == 0:
            return 0.0
        upper, lower = values[len(values) // 4], values[3 * len(values) // 4]
        return float((values > upper + 1.5 * (upper - lower)).count_nonzero()) / len(values)

    @abstractmethod
    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the first floor(ratio * N+) pairs of each group."""


class Exchange(Ranking):
    """Unstructured swaps within groups of a granularity, up to `largest_ratio`.

    Args:
        importance: S of each Linear, (out, in), >= 0.
        keep: keep mask of each Linear, (out, in) bool.
        granularity: what a swap may move within: block, layer, input or output.
        largest_ratio: the largest ratio that `at` will be asked for, in [0, 1].
    """

    def __init__(
        self, importance: Sequence[Tensor], keep: Sequence[Tensor], granularity: str, largest_ratio: float = 1.0
    ) -> None:
        self.granularity = granularity
        self.shapes = [mask.shape for mask in keep]
        self.keep = to_groups(keep, granularity)
        scores = to_groups(importance, granularity)
        self.positive = [positive_pairs(s, k) for s, k in zip(scores, self.keep, strict=True)]
        most = self.most(largest_ratio)
        self._grow = [Extremes(s, ~k, m, True) for s, k, m in zip(scores, self.keep, most, strict=True)]
        self._prune = [Extremes(s, k, m, False) for s, k, m in zip(scores, self.keep, most, strict=True)]

    def values(self) -> Tensor:
        """S_grow - S_prune of every ranked pair, one flat tensor."""
        return torch.cat([(g.ranked - p.ranked).reshape(-1) for g, p in zip(self._grow, self._prune, strict=True)])

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the first floor(ratio * N+) pairs of each group."""
        rebuilt = []
        for keep, grow, prune, positive in zip(self.keep, self._grow, self._prune, self.positive, strict=True):
            counts = swap_counts(positive, ratio)
            rebuilt.append(keep ^ grow.take(counts) ^ prune.take(counts))
        return from_groups(rebuilt, self.shapes, self.granularity)
