"""Rows of a Linear on their way from exchange to exchange: how a pair is chosen, and what it changes. Torch only."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .bits import infinite_where, signed
from .order import lowest

PAIRS = 2**24  # examined at once where every pair of a row is
Way = Callable[[], Tensor]  # takes one step in each row; which rows it improved, (rows,) bool


def turn_of(values: Tensor, keep: Tensor) -> Tensor:
    """2 v where a weight is kept, -2 v where it is pruned; (rows, width)."""
    return signed(values, keep).mul_(2)


class Rows(ABC):
    """Some rows: `alone` + `turn` * c is what each weight's change of state would cost by itself.

    `turn` is 2 v where a weight is kept and -2 v where it is pruned: half of it times a row of G is what its change of
    state adds to c.

    Args:
        values: v, (rows, width) float.
        keep: m, (rows, width) bool; changed in place.
        gram: G, (width, width).
    """

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor) -> None:
        self.values, self.keep, self.gram = values, keep, gram
        self.each = torch.arange(len(values), device=values.device)
        self.turn = turn_of(values, keep)

    @property
    @abstractmethod
    def ways(self) -> Sequence[Way]:
        """The ways of choosing a pair in each row and exchanging it where that lowers the row's error; in turn."""

    def run(self, steps: int) -> Tensor:
        """Take some steps; which rows may have more to gain, (rows,) bool: no way improves the others."""
        ways, idle = self.ways, torch.zeros_like(self.each)
        for step in range(steps):
            idle = torch.where(ways[step % len(ways)](), 0, idle + 1)
            if self.values.device.type == "cpu" and bool((idle >= len(ways)).all()):  # a device would stall over it
                break
        return idle < len(ways)

    def flip(self, pair: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
        """Change the state of two weights of each row, (rows, 2) columns, where that is `better`.

        Returns:
            What that adds to c in units of their rows of G, and whether they are kept now; (rows, 2).
        """
        turn = self.turn.gather(1, pair).mul_(better[:, None])
        kept = self.keep.gather(1, pair).logical_xor_(better[:, None])
        self.turn.scatter_add_(1, pair, -2 * turn)
        self.keep.scatter_(1, pair, kept)
        return turn.div_(2), kept


class FreeRows(Rows):
    """Exchanges between any two places of a row.

    Args:
        correlation: c, (rows, width); changed in place.
        thorough: whether to look at every pair is one of the ways: O(width^2) a row.
    """

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, thorough: bool) -> None:
        super().__init__(values, keep, gram)
        self.correlation, self.thorough = correlation, thorough
        self.costs = torch.empty_like(self.turn)
        self.alone = values.square() * gram.diagonal()
        self.kept_alone = infinite_where(self.alone, ~keep)
        self.pruned_alone = infinite_where(self.alone, keep)

    @property
    def ways(self) -> Sequence[Way]:
        """From the one end, from the other, and perhaps the best of all pairs."""
        return [self._grower_first, self._pruner_first, *([self._best_pair] if self.thorough else [])]

    def _grower_first(self) -> Tensor:
        """The pruned weight of each row that gains most alone, and the kept one that suits it."""
        return self._one_by_one(self.pruned_alone, self.kept_alone)

    def _pruner_first(self) -> Tensor:
        """The kept weight of each row that costs least alone, and the pruned one that suits it."""
        return self._one_by_one(self.kept_alone, self.pruned_alone)

    def _one_by_one(self, first: Tensor, second: Tensor) -> Tensor:
        """The weight that costs least by `first`, then by `second` another; the one goes back where both cost."""
        one, cost = self._least(first)
        turn = self.turn[self.each, one] / 2
        self._feel(one, turn)
        other, further = self._least(second)
        better = cost + further < 0
        following = torch.where(better, other, one)
        self._feel(following, torch.where(better, self.turn[self.each, other] / 2, -turn))
        self._exchange(torch.stack((one, other), dim=1), better)
        return better

    def _least(self, alone: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each row whose change of state costs least, and what; infinite where there is none."""
        costs = torch.addcmul(alone, self.turn, self.correlation, out=self.costs)
        least = lowest(costs)
        return least, costs[self.each, least]

    def _feel(self, columns: Tensor, change: Tensor) -> None:
        """What c becomes when one weight of each row changes by -change."""
        self.correlation.addcmul_(self.gram.index_select(0, columns), change[:, None])

    def _exchange(self, pair: Tensor, better: Tensor) -> Tensor:
        """Change the state of both weights of each row where that is better; what is to be felt."""
        change, kept = self.flip(pair, better)
        alone = self.alone.gather(1, pair)
        self.kept_alone.scatter_(1, pair, alone.masked_fill(~kept, torch.inf))
        self.pruned_alone.scatter_(1, pair, alone.masked_fill(kept, torch.inf))
        return change

    def _best_pair(self) -> Tensor:
        """The best of all pairs of each row: O(width^2) a row."""
        kept, pruned = (torch.addcmul(a, self.turn, self.correlation) for a in (self.kept_alone, self.pruned_alone))
        rows = max(PAIRS // kept.shape[1] ** 2, 1)
        found = [self._best_of(kept[some], pruned[some], self.values[some]) for some in self.each.split(rows)]
        pair, better = (torch.cat(parts) for parts in zip(*found, strict=True))
        for columns, change in zip(pair.unbind(1), self._exchange(pair, better).unbind(1), strict=True):
            self._feel(columns, change)
        return better

    def _best_of(self, kept: Tensor, pruned: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of some rows the best pair, and whether it lowers the error."""
        pairs = kept[:, :, None] + pruned[:, None, :]
        pairs = pairs.sub_(2 * values[:, :, None] * values[:, None, :] * self.gram).flatten(1)
        best, width = lowest(pairs), kept.shape[1]
        return torch.stack((best // width, best % width), dim=1), pairs.gather(1, best[:, None])[:, 0] < 0


class GroupRows(Rows):
    """Exchanges within M-groups; the columns are ordered by their place in the group, then by the group.

    The rows of G are in the weights' own order.

    Args:
        slopes: `turn` * c, (rows, width); changed in place.
        group: M.
    """

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor, slopes: Tensor, group: int) -> None:
        super().__init__(values, keep, gram)
        self.slopes = slopes
        self.members = len(values), group, values.shape[1] // group
        pairs = torch.triu_indices(group, group, 1, device=values.device).t()  # places of the one and of the other
        self.places, self.columns = pairs, self.members[2] * pairs  # columns of group 0
        self.both = values.new_zeros(len(pairs), group).scatter_(1, pairs, 1.0).expand(len(values), -1, -1)
        self.starts = self.members[2] * torch.arange(len(pairs), device=values.device)  # of each pair's groups
        self.coupled, self.pairs = self._coupled()
        alike = self._paired(keep.to(values.dtype).sub_(0.5), torch.add)  # 1 or -1: kept both, pruned both; else 0
        prohibitive = torch.finfo(values.dtype).max
        self.joint = torch.addcmul(self.coupled, alike, alike, value=prohibitive, out=alike)

    @property
    def ways(self) -> Sequence[Way]:
        """One, which leaves nothing out."""
        return [self._best_pair]

    def _coupled(self) -> tuple[Tensor, Tensor]:
        """v_i^2 G_ii + v_j^2 G_jj - 2 v_i v_j G_ij of all pairs of an M-group, (rows, pairs, groups), and scratch."""
        _, group, groups = self.members
        gram = self.gram.view(groups, group, group, groups).diagonal(dim1=0, dim2=3)  # place, place, group
        alone = self.values.square() * gram.diagonal(dim1=0, dim2=1).t().flatten()
        one, other = self.places.unbind(1)
        products = self._paired(self.values, torch.mul)
        return self._paired(alone, torch.add).addcmul_(products, gram[one, other], value=-2), products

    def _paired(self, tensor: Tensor, combine: Callable[..., Tensor]) -> Tensor:
        """What `combine` makes of all pairs of an M-group, (rows, pairs, groups), of a (rows, width) tensor."""
        (rows, group, groups), members = self.members, tensor.view(self.members)
        found = tensor.new_empty((rows, len(self.places), groups))
        for place, part in enumerate(found.split(list(range(group - 1, 0, -1)), dim=1)):
            combine(members[:, place, None], members[:, place + 1 :], out=part)
        return found

    def _best_pair(self) -> Tensor:
        """The best pair within any M-group of each row."""
        slopes = self.slopes.view(self.members)
        torch.baddbmm(self.joint, self.both, slopes, out=self.pairs)  # one product beats many sums
        best = lowest(self.pairs.flatten(1))
        which = best // self.members[2]
        group = (best - self.starts.index_select(0, which))[:, None]
        pair = self.columns.index_select(0, which) + group
        joint, turned = self.joint.flatten(1), self.slopes.gather(1, pair)
        better = turned.sum(1) + joint.gather(1, best[:, None])[:, 0] < 0  # the product may be inexact
        change, _ = self.flip(pair, better)
        rows = group * self.members[1] + self.places.index_select(0, which)
        felt = functional.embedding_bag(rows, self.gram, per_sample_weights=change, mode="sum")
        self.slopes.scatter_add_(1, pair, turned.mul_(better[:, None]).mul_(-2)).addcmul_(self.turn, felt)
        kept = (self.keep.gather(1, group + places) for places in self.columns.t())
        same = torch.eq(*kept)
        at = group + self.starts
        joint.scatter_(1, at, self.coupled.flatten(1).gather(1, at).masked_fill_(same, torch.inf))
        return better
