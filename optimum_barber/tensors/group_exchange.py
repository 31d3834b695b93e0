"""The exchange under an N:M pattern: every M consecutive weights keep exactly N (METHODS: LLM-Barber, step 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .exchange import Extremes, Ranking, from_groups, positive_pairs, swap_counts, to_groups
from .masks import count_true, rank_in_group


class GroupExchange(Ranking):
    """`pairing: group` (paper, III-D): pairs are formed inside each M-group and compete within a scope.

    An M-group offers min(N, M - N) pairs; of a scope's N+ pairs worth more than zero the floor(ratio * N+)
    best are swapped, equal values in the order of their M-groups.

    Args:
        importance: S of each Linear, (out, in), >= 0.
        keep: keep mask of each Linear, (out, in) bool, N of every M.
        group: M.
        scope: output, layer or block.
    """

    def __init__(
        self,
        importance: Sequence[Tensor],
        keep: Sequence[Tensor],
        group: int,
        scope: str,
        largest_ratio: float = 1.0,
    ) -> None:
        self.group, self.scope, self.keep = group, scope, list(keep)
        self._places = []
        values = []
        for s, k in zip(importance, keep, strict=True):
            grow, prune, value = _group_pairs(s.reshape(-1, group), k.reshape(-1, group))
            self._places.append((grow, prune))
            values.append(value.reshape(s.shape[0], -1))
        self._shapes = [value.shape for value in values]
        self._values = to_groups(values, scope)
        self.positive = [count_true(value > 0) for value in self._values]
        most = self.most(largest_ratio)
        self._best = [Extremes(v, v > 0, m, True) for v, m in zip(self._values, most, strict=True)]

    def values(self) -> Tensor:
        """Every ranked pair value of every scope, one flat tensor."""
        return torch.cat([best.ranked.reshape(-1) for best in self._best])

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after swapping the best floor(ratio * N+) pairs of each scope."""
        chosen = [
            best.take(swap_counts(positive, ratio)) for best, positive in zip(self._best, self.positive, strict=True)
        ]
        rebuilt = []
        for keep, swapped, places in zip(
            self.keep, from_groups(chosen, self._shapes, self.scope), self._places, strict=True
        ):
            rebuilt.append(keep ^ self._flipped(keep, swapped, places))
        return rebuilt

    def _flipped(self, keep: Tensor, swapped: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
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


class RowExchange(Ranking):
    """`pairing: row` (published code): output rows decide what grows, M-groups what makes room.

    In each output row the floor(ratio * N+) most important pruned weights grow; in each M-group as many
    of the least important kept weights go as grew there. Where more than N would grow in one M-group,
    the N most important do.
    """

    def __init__(
        self, importance: Sequence[Tensor], keep: Sequence[Tensor], group: int, largest_ratio: float = 1.0
    ) -> None:
        self.group = group
        self.importance, self.keep = list(importance), list(keep)
        self.positive = [positive_pairs(s, k) for s, k in zip(importance, keep, strict=True)]
        most = self.most(largest_ratio)
        self._grow = [Extremes(s, ~k, m, True) for s, k, m in zip(importance, keep, most, strict=True)]
        self._prune = [Extremes(s, k, m, False) for s, k, m in zip(importance, keep, most, strict=True)]

    def values(self) -> Tensor:
        """S_grow - S_prune of every ranked pair of every row, one flat tensor."""
        return torch.cat([(g.ranked - p.ranked).reshape(-1) for g, p in zip(self._grow, self._prune, strict=True)])

    def at(self, ratio: float) -> list[Tensor]:
        """The keep masks after growing the first floor(ratio * N+) weights of each row."""
        return [
            self._swapped(s, k, grow.take(swap_counts(positive, ratio)))
            for s, k, grow, positive in zip(self.importance, self.keep, self._grow, self.positive, strict=True)
        ]

    def _swapped(self, importance: Tensor, keep: Tensor, grown: Tensor) -> Tensor:
        scores, kept, grown = (tensor.reshape(-1, self.group) for tensor in (importance, keep, grown))
        grown = grown & (rank_in_group(-scores.masked_fill(~grown, -torch.inf)) < kept.sum(1, keepdim=True))
        leaves = rank_in_group(scores.masked_fill(~kept, torch.inf)) < grown.sum(1, keepdim=True)
        return (kept ^ grown ^ leaves).reshape(keep.shape)
