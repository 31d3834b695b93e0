"""Rows of a Linear on their way from exchange to exchange: how a pair is chosen, and what it changes. Torch only."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .selection import lowest

PAIRS = 2**24  # examined at once where every pair of a row is
Pair = tuple[Tensor, Tensor, Tensor]  # of each row: the weight to prune, the one to grow, what both do to its error


class Rows(ABC):
    """Some rows: `alone` + `turn` * c is what each weight's change of state would cost by itself.

    Args:
        values: v, (rows, width) float.
        keep: m, (rows, width) bool; changed in place.
        gram: G, (width, width).
        correlation: c, (rows, width); changed in place.
    """

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor) -> None:
        self.values, self.keep, self.gram, self.correlation = values, keep, gram, correlation
        self.each = torch.arange(len(values), device=values.device)
        self.alone = values.square() * gram.diagonal()
        self.turn = torch.where(keep, 2 * values, -2 * values)

    @property
    @abstractmethod
    def ways(self) -> Sequence[Callable[[], Pair]]:
        """The ways of choosing a pair in each row; taken in turn."""

    @abstractmethod
    def turned(self, pair: Tensor, kept: Tensor) -> None:
        """Told after every exchange of the two columns of each row, and whether they are kept now, (rows, 2)."""

    def run(self, steps: int) -> Tensor:
        """Take some steps; which rows may have more to gain, (rows,) bool: no way improves the others."""
        ways, idle = self.ways, torch.zeros_like(self.each)
        for step in range(steps):
            idle = torch.where(self._exchange(*ways[step % len(ways)]()), 0, idle + 1)
            if self.values.device.type == "cpu" and bool((idle >= len(ways)).all()):  # a device would stall over it
                break
        return idle < len(ways)

    def _exchange(self, prune: Tensor, grow: Tensor, change: Tensor) -> Tensor:
        """Prune and grow a weight of each row, (rows,) indices, where that lowers its error; where it did."""
        better, pair = change < 0, torch.stack((prune, grow), dim=1)
        values, kept = self.values.gather(1, pair), self.keep.gather(1, pair) ^ better[:, None]
        lost, grown = (values * better[:, None]).unbind(1)
        self.correlation.addcmul_(self.gram.index_select(0, prune), lost[:, None])
        self.correlation.addcmul_(self.gram.index_select(0, grow), grown[:, None], value=-1)
        self.keep.scatter_(1, pair, kept)
        self.turn.scatter_(1, pair, torch.where(kept, 2 * values, -2 * values))
        self.turned(pair, kept)
        return better


class FreeRows(Rows):
    """Exchanges between any two places of a row.

    With `thorough`, to look at every pair is one of the ways: O(width^2) a row.
    """

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, thorough: bool) -> None:
        super().__init__(values, keep, gram, correlation)
        self.thorough = thorough
        self.kept_alone = self.alone.masked_fill(~keep, torch.inf)
        self.pruned_alone = self.alone.masked_fill(keep, torch.inf)

    @property
    def ways(self) -> Sequence[Callable[[], Pair]]:
        """From the one end, from the other, and perhaps the best of all pairs."""
        return [self._grower_first, self._pruner_first, *([self._best_pair] if self.thorough else [])]

    def turned(self, pair: Tensor, kept: Tensor) -> None:
        """Who may be pruned and who may be grown."""
        alone = self.alone.gather(1, pair)
        self.kept_alone.scatter_(1, pair, alone.masked_fill(~kept, torch.inf))
        self.pruned_alone.scatter_(1, pair, alone.masked_fill(kept, torch.inf))

    def _costs(self) -> tuple[Tensor, Tensor]:
        """What each kept weight costs when it goes, and each pruned one when it is grown; infinite for the others."""
        return (
            torch.addcmul(self.kept_alone, self.turn, self.correlation),
            torch.addcmul(self.pruned_alone, self.turn, self.correlation),
        )

    def _grower_first(self) -> Pair:
        """The pruned weight of each row that gains most alone, and the kept one that suits it."""
        kept, pruned = self._costs()
        grow = lowest(pruned)
        return self._pair(lowest(self._beside(grow, kept)), grow, kept, pruned)

    def _pruner_first(self) -> Pair:
        """The kept weight of each row that costs least alone, and the pruned one that suits it."""
        kept, pruned = self._costs()
        prune = lowest(kept)
        return self._pair(prune, lowest(self._beside(prune, pruned)), kept, pruned)

    def _beside(self, chosen: Tensor, costs: Tensor) -> Tensor:
        """What every other weight's change costs beside that of one chosen weight of its row."""
        coupled = self.gram.index_select(0, chosen).mul_(2 * self.values[self.each, chosen][:, None])
        return torch.addcmul(costs, self.values, coupled, value=-1)

    def _pair(self, prune: Tensor, grow: Tensor, kept: Tensor, pruned: Tensor) -> Pair:
        """With what the exchange changes; infinite where a row has nothing to prune or to grow."""
        coupled = 2 * self.values[self.each, prune] * self.values[self.each, grow] * self.gram[prune, grow]
        return prune, grow, kept[self.each, prune] + pruned[self.each, grow] - coupled

    def _best_pair(self) -> Pair:
        """The best of all pairs of each row: O(width^2) a row."""
        kept, pruned = self._costs()
        width = kept.shape[1]
        rows = max(PAIRS // width**2, 1)
        best = torch.cat([self._best_of(kept[some], pruned[some], some) for some in self.each.split(rows)])
        return self._pair(best // width, best % width, kept, pruned)

    def _best_of(self, kept: Tensor, pruned: Tensor, rows: Tensor) -> Tensor:
        values = self.values[rows]
        pairs = kept[:, :, None] + pruned[:, None, :]
        return lowest(pairs.sub_(2 * values[:, :, None] * values[:, None, :] * self.gram).flatten(1))


class GroupRows(Rows):
    """Exchanges within M-groups; the columns are ordered by their place in the group, then by the group."""

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, group: int) -> None:
        super().__init__(values, keep, gram, correlation)
        self.members = len(values), group, values.shape[1] // group
        self.one, self.other = torch.triu_indices(group, group, 1, device=values.device)  # of a pair, as in `_paired`
        self.ones, self.others = (self.members[2] * place for place in (self.one, self.other))  # columns, in group 0
        self.starts = self.members[2] * torch.arange(len(self.one), device=values.device)  # of each pair's groups
        self.coupled = self._coupled()
        self.joint = self.coupled.masked_fill(self._paired(keep, torch.eq), torch.inf)
        self.costs = torch.empty_like(self.coupled)

    @property
    def ways(self) -> Sequence[Callable[[], Pair]]:
        """One, which leaves nothing out."""
        return [self._best_pair]

    def turned(self, pair: Tensor, kept: Tensor) -> None:
        """Which pairs of the groups concerned are one kept and one pruned weight."""
        group = pair[:, :1] % self.members[2]
        same = self.keep.gather(1, group + self.ones) == self.keep.gather(1, group + self.others)
        at = group + self.starts
        coupled = self.coupled.flatten(1).gather(1, at)
        self.joint.flatten(1).scatter_(1, at, coupled.masked_fill_(same, torch.inf))

    def _coupled(self) -> Tensor:
        """-2 v_i v_j G_ij of all pairs of an M-group, (rows, pairs, groups)."""
        _, group, groups = self.members
        gram = self.gram.view(group, groups, group, groups).diagonal(dim1=1, dim2=3)
        return self._paired(self.values, torch.mul).mul_(-2 * gram[self.one, self.other])

    def _paired(self, tensor: Tensor, combine: Callable[..., Tensor], into: Tensor | None = None) -> Tensor:
        """What `combine` makes of all pairs of an M-group, (rows, pairs, groups), of a (rows, width) tensor."""
        (rows, group, groups), members = self.members, tensor.view(self.members)
        found = tensor.new_empty((rows, len(self.one), groups)) if into is None else into
        parts = found.split(list(range(group - 1, 0, -1)), dim=1)
        for place, part in enumerate(parts):
            combine(members[:, place, None], members[:, place + 1 :], out=part)
        return found

    def _best_pair(self) -> Pair:
        """The best pair within any M-group of each row."""
        costs = torch.addcmul(self.alone, self.turn, self.correlation)
        pairs = self._paired(costs, torch.add, self.costs).add_(self.joint).flatten(1)
        best = lowest(pairs)
        which = best // self.members[2]
        at = best - self.starts[which]
        one, other = self.ones[which] + at, self.others[which] + at
        kept = self.keep[self.each, one]
        return torch.where(kept, one, other), torch.where(kept, other, one), pairs[self.each, best]
