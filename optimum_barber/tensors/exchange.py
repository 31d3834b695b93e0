"""LLM-Barber's exchange of pruned against kept weights (arXiv 2408.10631). Torch only.

In every comparison group the pruned weights, most important first, are paired with the kept weights, least important
first. Pair i is worth S_grow(i) - S_prune(i), which falls with i. N+ pairs are worth more than zero, and an exchange at
the ratio alpha swaps the first floor(alpha * N+) of them (Eq. 9-11).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .masks import count_true, fill_up, rank_in_group
from .order import extremes, kth_smallest

BINS = 40  # of the histogram of pair values
BINNED_AT_ONCE = 2**20  # pair values: their places take twice their memory
DECADES = 8.0  # below the largest value; what is smaller still counts into the lowest bin


def to_groups(tensors: Sequence[Tensor], granularity: str) -> list[Tensor]:
    """The comparison groups of a block's (out, in) tensors, as matrices whose rows are groups.

    One for all Linears (`block`), each Linear (`layer`), each of its columns (`input`) or of its rows (`output`).
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
    """N+ of each group, (groups,) int64, from importance S >= 0 and `keep`, both (groups, width); nothing is paired.

    With K weights kept in the group and t the K-th largest importance of all its weights, pair k is worth more than
    zero as long as a threshold fits between its members; so N+ = max(#{pruned, S > t}, #{kept, S < t}). The two differ
    only by ties at t.
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


def _swap_counts(positive: Tensor, ratio: float) -> Tensor:
    """floor(ratio * N+) of each group, (groups,) int64; a product that is whole but for rounding is whole."""
    exact = positive.double() * ratio
    return (exact + exact * 1e-14 + 1e-9).floor().long()


class _Extremes:
    """The highest or lowest candidates of each row: `ranked` once, (rows, most), and taken in any number up to that."""

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
    """All swaps of a block, ranked once and applied at any ratio; `positive` is N+ of the groups of each matrix."""

    positive: list[Tensor]

    @property
    def pairs(self) -> int:
        """N+ summed over all groups."""
        return sum(int(positive.sum()) for positive in self.positive)

    @abstractmethod
    def values(self) -> Iterator[Tensor]:
        """The ranked pair values of one matrix of groups after the other, of any shape; not all are positive."""

    def worthwhile(self) -> Tensor:
        """The values of all ranked pairs that are worth a swap, (pairs,)."""
        return worthwhile(self.values())

    @abstractmethod
    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the first floor(ratio * N+) pairs of each group."""

    def outlier_share(self) -> float:
        """The share of the worthwhile pairs whose value lies above the upper Tukey fence, Q3 + 1.5 (Q3 - Q1).

        The paper (IV-C, Fig. 3) finds the ratio that is worth taking among these outliers.
        """
        values = self.worthwhile()
        pairs = len(values)
        if pairs == 0:
            return 0.0
        upper, lower = (kth_smallest(values, pairs - above) for above in (pairs // 4, 3 * pairs // 4))
        return float((values > upper + 1.5 * (upper - lower)).count_nonzero()) / pairs


class _RankedGroups:
    """The pairs of one matrix of groups, (groups, width), for ratios up to `largest_ratio`."""

    def __init__(self, importance: Tensor, keep: Tensor, largest_ratio: float) -> None:
        self.importance, self.keep = importance, keep
        self.positive = positive_pairs(importance, keep)
        most = int(_swap_counts(self.positive, largest_ratio).max())
        self.grow = _Extremes(importance, ~keep, most, largest=True)
        self.prune = _Extremes(importance, keep, most, largest=False)

    def grown(self, ratio: float) -> Tensor:
        """True where the first floor(ratio * N+) pairs of each group grow a weight, (groups, width)."""
        return self.grow.take(_swap_counts(self.positive, ratio))

    def at(self, ratio: float) -> Tensor:
        return self.keep ^ self.grown(ratio) ^ self.prune.take(_swap_counts(self.positive, ratio))


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
        self.matrices = [_RankedGroups(scores, mask, largest_ratio) for scores, mask in pairs]
        self.positive = [groups.positive for groups in self.matrices]

    def values(self) -> Iterator[Tensor]:
        """S_grow - S_prune of the ranked pairs of one matrix of groups after the other, best first in a group."""
        for pairs in self.matrices:
            yield pairs.grow.ranked - pairs.prune.ranked

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the first floor(ratio * N+) pairs of each group."""
        return from_groups([groups.at(ratio) for groups in self.matrices], self.shapes, self.granularity)


class RowExchange(Exchange):
    """`pairing: row` of N:M (published code): output rows decide what grows, M-groups what makes room.

    In each output row the floor(ratio * N+) most important pruned weights grow. In each M-group as many of the least
    important kept weights go as grew there. Where more than N would grow in one M-group (`group` is M), the N most
    important do.
    """

    def __init__(
        self, importance: Sequence[Tensor], keep: Sequence[Tensor], group: int, largest_ratio: float = 1.0
    ) -> None:
        super().__init__(importance, keep, "output", largest_ratio)
        self.group = group

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after growing the first floor(ratio * N+) weights of each row."""
        return [self._swapped(rows, rows.grown(ratio)) for rows in self.matrices]

    def _swapped(self, rows: _RankedGroups, grown: Tensor) -> Tensor:
        scores, kept, grown = (t.reshape(-1, self.group) for t in (rows.importance, rows.keep, grown))
        grown = grown & (rank_in_group(-scores.masked_fill(~grown, -torch.inf)) < kept.sum(1, keepdim=True))
        leaves = rank_in_group(scores.masked_fill(~kept, torch.inf)) < grown.sum(1, keepdim=True)
        return (kept ^ grown ^ leaves).reshape(rows.keep.shape)


class GroupExchange(Ranking):
    """`pairing: group` of N:M (paper, III-D): pairs are formed inside each M-group and compete within a scope.

    An M-group offers min(N, M - N) pairs. Of a scope's N+ pairs worth more than zero the floor(ratio * N+) best are
    swapped, equal values in the order of their M-groups. The scope is output, layer or block; `group` is M.
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
        self.positive, self._best = list[Tensor](), list[_Extremes]()
        for scoped in to_groups(values, scope):
            positive = count_true(scoped > 0)
            most = int(_swap_counts(positive, largest_ratio).max())
            self.positive.append(positive)
            self._best.append(_Extremes(scoped, scoped > 0, most, largest=True))

    def values(self) -> Iterator[Tensor]:
        """The ranked pair values of one matrix of scopes after the other, best first in a scope."""
        for best in self._best:
            yield best.ranked

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the best floor(ratio * N+) pairs of each scope."""
        counts = [_swap_counts(positive, ratio) for positive in self.positive]
        chosen = [best.take(count) for best, count in zip(self._best, counts, strict=True)]
        swapped = from_groups(chosen, self._shapes, self.scope)
        masks = []
        for keep, pairs, places in zip(self.keep, swapped, self._places, strict=True):
            flips = torch.zeros_like(keep).reshape(-1, self.group)
            for place in places:
                flips |= torch.zeros_like(flips).scatter_(1, place, pairs.reshape(place.shape))
            masks.append(keep ^ flips.reshape(keep.shape))
        return masks


def _group_pairs(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position grown, position pruned and value of each pair: three of (groups, min(N, M - N))."""
    kept = int(keep[0].sum())
    pairs = min(kept, keep.shape[1] - kept)
    grow = scores.masked_fill(keep, -torch.inf).sort(dim=1, descending=True, stable=True)
    prune = scores.masked_fill(~keep, torch.inf).sort(dim=1, stable=True)
    value = grow.values[:, :pairs] - prune.values[:, :pairs]
    return grow.indices[:, :pairs], prune.indices[:, :pairs], value


def worthwhile(values: Iterable[Tensor]) -> Tensor:
    """The finite and positive ones among pair values of any shape, flat and in their order."""
    return torch.cat([part[torch.isfinite(part) & (part > 0)] for part in values])


def pair_value_histogram(values: Tensor, swapped: int) -> dict[str, Any] | None:
    """Positive pair values in bins of equal width on a log scale (the paper's Fig. 3); None where there are none.

    Args:
        values: S_grow - S_prune of the worthwhile pairs, (pairs,), finite and positive.
        swapped: how many of them an exchange swaps.

    Returns:
        `lowest` and `highest`: the ends of the bins; `counts`: BINS integers; `cut`: the swapped-th largest value,
        to whose right lie as many pairs as are swapped, None where none are.
    """
    pairs = len(values)
    if pairs == 0:
        return None
    least, most = values.aminmax()
    highest = float(most.log10())
    lowest = max(float(least.log10()), highest - DECADES)
    width = (highest - lowest) / BINS or 1.0
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    for part in values.split(BINNED_AT_ONCE):
        places = ((part.log10() - lowest) / width).long().clamp_(0, BINS - 1)
        counts += torch.bincount(places, minlength=BINS)
    kept = min(swapped, pairs)
    cut = float(kth_smallest(values, pairs - kept + 1)) if kept else None
    return {"lowest": 10.0**lowest, "highest": 10.0**highest, "counts": counts.tolist(), "cut": cut}
