"""LLM-Barber's exchange of pruned against kept weights (METHODS: LLM-Barber, steps 4 to 6). Torch only.

In every comparison group the pruned weights, most important first, are paired with the kept weights, least important
first. Pair i is worth S_grow(i) - S_prune(i), which falls with i. N+ pairs are worth more than zero, and an exchange at
the ratio alpha swaps the first floor(alpha * N+) of them (Eq. 9-11).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import count_true, fill_up, rank_in_group
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
    if granularity == "input":
        return [tensor.t() for tensor in tensors]
    return list(tensors)


def from_groups(groups: Sequence[Tensor], shapes: Sequence[torch.Size], granularity: str) -> list[Tensor]:
    """The inverse of `to_groups`."""
    if granularity == "block":
        groups = groups[0][0].split([shape.numel() for shape in shapes])
    elif granularity == "input":
        groups = [group.t().contiguous() for group in groups]
    return [group.reshape(shape) for group, shape in zip(groups, shapes, strict=True)]


def positive_pairs(importance: Tensor, keep: Tensor) -> Tensor:
    """N+ of each group, without pairing anything.

    With K weights kept in the group and t the K-th largest importance of all its weights, pair k is worth more than
    zero as long as a threshold fits between its members; so N+ = max(#{pruned, S > t}, #{kept, S < t}). The two differ
    only by ties at t.

    Args:
        importance: S, (groups, width), >= 0.
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
    """The highest or lowest candidates of each row, ranked once and taken in any number up to `most`.

    Attributes:
        ranked: the scores of these candidates, (rows, most), from the extreme inwards.
    """

    def __init__(self, scores: Tensor, candidates: Tensor, most: int, largest: bool) -> None:
        self.scores, self.candidates, self.largest = scores, candidates, largest
        self.void = -torch.inf if largest else torch.inf
        if len(scores) == 1:  # half the memory and time of masking, and one row needs no alignment
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

    @abstractmethod
    def values(self) -> Tensor:
        """The ranked pair values, best first within a group; those of groups with fewer pairs end in 0 or below."""

    @abstractmethod
    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the first floor(ratio * N+) pairs of each group."""

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


class RankedGroups:
    """The pairs of one matrix of groups.

    Args:
        importance: S, (groups, width), >= 0.
        keep: (groups, width) bool.
        largest_ratio: the largest ratio that will be asked for, in [0, 1].
    """

    def __init__(self, importance: Tensor, keep: Tensor, largest_ratio: float) -> None:
        self.importance, self.keep = importance, keep
        self.positive = positive_pairs(importance, keep)
        most = int(swap_counts(self.positive, largest_ratio).max())
        self.grow = Extremes(importance, ~keep, most, largest=True)
        self.prune = Extremes(importance, keep, most, largest=False)

    def values(self) -> Tensor:
        """S_grow - S_prune of every ranked pair, flat."""
        return (self.grow.ranked - self.prune.ranked).reshape(-1)

    def grown(self, ratio: float) -> Tensor:
        """True where the first floor(ratio * N+) pairs of each group grow a weight, (groups, width)."""
        return self.grow.take(swap_counts(self.positive, ratio))

    def at(self, ratio: float) -> Tensor:
        """The keep mask after swapping these pairs, (groups, width)."""
        return self.keep ^ self.grown(ratio) ^ self.prune.take(swap_counts(self.positive, ratio))


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
        pairs = zip(to_groups(importance, granularity), to_groups(keep, granularity), strict=True)
        self.matrices = [RankedGroups(scores, mask, largest_ratio) for scores, mask in pairs]
        self.positive = [groups.positive for groups in self.matrices]

    def values(self) -> Tensor:
        """S_grow - S_prune of every ranked pair, one flat tensor."""
        return torch.cat([groups.values() for groups in self.matrices])

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the first floor(ratio * N+) pairs of each group."""
        return from_groups([groups.at(ratio) for groups in self.matrices], self.shapes, self.granularity)


class RowExchange(Exchange):
    """`pairing: row` of N:M (published code): output rows decide what grows, M-groups what makes room.

    In each output row the floor(ratio * N+) most important pruned weights grow. In each M-group as many of the least
    important kept weights go as grew there. Where more than N would grow in one M-group, the N most important do.

    Args:
        group: M; the others are those of `Exchange`, with N of every M kept.
    """

    def __init__(
        self, importance: Sequence[Tensor], keep: Sequence[Tensor], group: int, largest_ratio: float = 1.0
    ) -> None:
        super().__init__(importance, keep, "output", largest_ratio)
        self.group = group

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after growing the first floor(ratio * N+) weights of each row."""
        return [self._swapped(rows, rows.grown(ratio)) for rows in self.matrices]

    def _swapped(self, rows: RankedGroups, grown: Tensor) -> Tensor:
        scores, kept, grown = (t.reshape(-1, self.group) for t in (rows.importance, rows.keep, grown))
        grown = grown & (rank_in_group(-scores.masked_fill(~grown, -torch.inf)) < kept.sum(1, keepdim=True))
        leaves = rank_in_group(scores.masked_fill(~kept, torch.inf)) < grown.sum(1, keepdim=True)
        return (kept ^ grown ^ leaves).reshape(rows.keep.shape)


class GroupExchange(Ranking):
    """`pairing: group` of N:M (paper, III-D): pairs are formed inside each M-group and compete within a scope.

    An M-group offers min(N, M - N) pairs. Of a scope's N+ pairs worth more than zero the floor(ratio * N+) best are
    swapped, equal values in the order of their M-groups.

    Args:
        group: M; the others are those of `Exchange`, with N of every M kept.
        scope: output, layer or block.
    """

    def __init__(
        self, importance: Sequence[Tensor], keep: Sequence[Tensor], group: int, scope: str, largest_ratio: float = 1.0
    ) -> None:
        self.group, self.scope, self.keep = group, scope, list(keep)
        self._places, values = list[tuple[Tensor, Tensor]](), list[Tensor]()
        for scores, mask in zip(importance, keep, strict=True):
            grow, prune, value = _group_pairs(scores.reshape(-1, group), mask.reshape(-1, group))
            self._places.append((grow, prune))
            values.append(value.reshape(scores.shape[0], -1))
        self._shapes = [value.shape for value in values]
        self.positive, self._best = list[Tensor](), list[Extremes]()
        for scoped in to_groups(values, scope):
            positive = count_true(scoped > 0)
            most = int(swap_counts(positive, largest_ratio).max())
            self.positive.append(positive)
            self._best.append(Extremes(scoped, scoped > 0, most, largest=True))

    def values(self) -> Tensor:
        """Every ranked pair value of every scope, one flat tensor."""
        return torch.cat([best.ranked.reshape(-1) for best in self._best])

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the best floor(ratio * N+) pairs of each scope."""
        counts = [swap_counts(positive, ratio) for positive in self.positive]
        chosen = [best.take(count) for best, count in zip(self._best, counts, strict=True)]
        swapped = from_groups(chosen, self._shapes, self.scope)
        linears = zip(self.keep, swapped, self._places, strict=True)
        return [keep ^ self._flipped(keep, pairs, places) for keep, pairs, places in linears]

    def _flipped(self, keep: Tensor, swapped: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """True at both members of each swapped pair, (out, in)."""
        flips = torch.zeros_like(keep).reshape(-1, self.group)
        swapped = swapped.reshape(places[0].shape)
        for place in places:
            flips |= torch.zeros_like(flips).scatter_(1, place, swapped)
        return flips.reshape(keep.shape)


def _group_pairs(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position grown, position pruned and value of each pair: three of (groups, min(N, M - N))."""
    kept = int(keep[0].sum())
    pairs = min(kept, keep.shape[1] - kept)
    grow = scores.masked_fill(keep, -torch.inf).sort(dim=1, descending=True, stable=True)
    prune = scores.masked_fill(~keep, torch.inf).sort(dim=1, stable=True)
    value = grow.values[:, :pairs] - prune.values[:, :pairs]
    return grow.indices[:, :pairs], prune.indices[:, :pairs], value
