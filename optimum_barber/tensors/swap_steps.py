"""Rows of a Linear on their way from exchange to exchange: how a pair is chosen, and what it changes. Torch only.

The symbols are those of `swaps`. With turn_i = 2 v_i where i is kept and -2 v_i where it is pruned, the change of state
of i alone costs v_i^2 G_ii + turn_i c_i, and adds turn_i / 2 times the row G_i to c. Exchanging i and j costs both, and
their coupling -2 v_i v_j G_ij.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .masks import infinite_where, signed
from .order import lowest_column

PAIRS = 2**24  # examined at once where every pair of a row is
Step = Callable[[], Tensor]  # exchanges a pair in each row where that helps; in which rows it did, (rows,) bool


def turn_of(values: Tensor, keep: Tensor) -> Tensor:
    """2 v where a weight is kept, -2 v where it is pruned; (rows, width)."""
    return signed(values, keep).mul_(2)


class Rows(ABC):
    """Some rows of a Linear: values v, (rows, width) float, keep masks m, changed in place, and the Gram matrix G."""

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor) -> None:
        self.values, self.keep, self.gram = values, keep, gram
        self.row_indices = torch.arange(len(values), device=values.device)
        self.turn = turn_of(values, keep)

    @property
    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """The kinds of steps, taken in turn; each lowers the error of the rows that it changes."""

    def run(self, count: int) -> Tensor:
        """Take `count` steps; which rows may have more to gain, (rows,) bool: no kind of step improves the others."""
        steps, idle = self.steps, torch.zeros_like(self.row_indices)
        for index in range(count):
            improved = steps[index % len(steps)]()
            idle = torch.where(improved, 0, idle + 1)
            if self.values.device.type == "cpu" and bool((idle >= len(steps)).all()):  # a device would stall over it
                break
        return idle < len(steps)

    def flip(self, pair: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
        """Change the state of both weights of `pair`, (rows, 2) columns, in the rows where that is `better`, (rows,).

        Returns turn / 2 before the change, 0 where nothing changed, and the keep mask after it; (rows, 2) each.
        """
        turn = self.turn.gather(1, pair).mul_(better[:, None])
        kept = self.keep.gather(1, pair).logical_xor_(better[:, None])
        self.turn.scatter_add_(1, pair, -2 * turn)
        self.keep.scatter_(1, pair, kept)
        return turn.div_(2), kept


class FreeRows(Rows):
    """Exchanges between any two places of a row; a thorough search over every pair costs O(width^2) a row."""

    def __init__(self, values: Tensor, keep: Tensor, correlation: Tensor, gram: Tensor, thorough: bool) -> None:
        super().__init__(values, keep, gram)
        self.correlation, self.thorough = correlation, thorough
        self.costs = torch.empty_like(self.turn)
        self.alone = values.square() * gram.diagonal()
        self.kept_alone = infinite_where(self.alone, ~keep)
        self.pruned_alone = infinite_where(self.alone, keep)

    @property
    def steps(self) -> Sequence[Step]:
        """The best pruned weight first, the kept one that costs least first, and, if thorough, every pair."""
        grow_first = partial(self._one_by_one, self.pruned_alone, self.kept_alone)
        prune_first = partial(self._one_by_one, self.kept_alone, self.pruned_alone)
        return [grow_first, prune_first, self._best_pair] if self.thorough else [grow_first, prune_first]

    def _one_by_one(self, first: Tensor, second: Tensor) -> Tensor:
        """Exchange the cheapest weight of `first` and, once c knows of that, of `second`, unless both cost."""
        one, cost = self._cheapest(first, self.correlation)
        further = torch.addcmul(self.correlation, self.gram.index_select(0, one), self._half_turn(one))
        other, further_cost = self._cheapest(second, further)
        better = cost + further_cost < 0
        further.addcmul_(self.gram.index_select(0, other), self._half_turn(other))
        torch.where(better[:, None], further, self.correlation, out=self.correlation)
        self._exchange(torch.stack((one, other), dim=1), better)
        return better

    def _cheapest(self, alone: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """The column of each row whose change of state costs least, and that cost; infinite where there is none."""
        costs = torch.addcmul(alone, self.turn, correlation, out=self.costs)
        column = lowest_column(costs)
        return column, costs[self.row_indices, column]

    def _half_turn(self, columns: Tensor) -> Tensor:
        return self.turn.gather(1, columns[:, None]) / 2

    def _exchange(self, pair: Tensor, better: Tensor) -> Tensor:
        factors, kept = self.flip(pair, better)
        alone = self.alone.gather(1, pair)
        self.kept_alone.scatter_(1, pair, alone.masked_fill(~kept, torch.inf))
        self.pruned_alone.scatter_(1, pair, alone.masked_fill(kept, torch.inf))
        return factors

    def _best_pair(self) -> Tensor:
        """Exchange the best of all pairs of each row: O(width^2) a row."""
        kept = torch.addcmul(self.kept_alone, self.turn, self.correlation)
        pruned = torch.addcmul(self.pruned_alone, self.turn, self.correlation)
        pairs, improvements = [], []
        for rows in self.row_indices.split(max(PAIRS // kept.shape[1] ** 2, 1)):
            pair, better = self._best_of(kept[rows], pruned[rows], self.values[rows])
            pairs.append(pair)
            improvements.append(better)
        pair, better = torch.cat(pairs), torch.cat(improvements)
        factors = self._exchange(pair, better)
        for columns, factor in zip(pair.unbind(1), factors.unbind(1), strict=True):
            self.correlation.addcmul_(self.gram.index_select(0, columns), factor[:, None])
        return better

    def _best_of(self, kept: Tensor, pruned: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The best pair of each of some rows, and whether it lowers the error."""
        pairs = kept[:, :, None] + pruned[:, None, :]
        pairs = pairs.sub_(2 * values[:, :, None] * values[:, None, :] * self.gram).flatten(1)
        best, width = lowest_column(pairs), kept.shape[1]
        return torch.stack((best // width, best % width), dim=1), pairs.gather(1, best[:, None])[:, 0] < 0


class GroupRows(Rows):
    """Exchanges within M-groups.

    Column p * groups + g is place p of group g; the rows of G are in the weights' own order, g * M + p. With the
    slopes s = turn * c, exchanging i and j of a group, of which one is kept, changes the error by

        s_i + s_j + J_ij,    J_ij = v_i^2 G_ii + v_j^2 G_jj - 2 v_i v_j G_ij,

    then s_i and s_j change sign with their turn, and every slope changes by s_k += turn_k (turn_i G_ik +
    turn_j G_jk) / 2.

    Args:
        slopes: s, (rows, width); changed in place.
        group: M.

    Attributes:
        places: the two places p < q of each of the M (M - 1) / 2 pairs, (pairs, 2).
        coupled: J of all pairs, (rows, pairs, groups).
        joint: the same, prohibitive where both weights are kept or both are pruned.
    """

    def __init__(self, values: Tensor, keep: Tensor, slopes: Tensor, gram: Tensor, group: int) -> None:
        super().__init__(values, keep, gram)
        self.slopes = slopes
        self.group_size, self.groups = group, values.shape[1] // group
        self.members_shape = (len(values), group, self.groups)
        self.places = torch.triu_indices(group, group, 1, device=values.device).t()
        self.columns = self.groups * self.places  # of group 0
        self.first_pairs = self.groups * torch.arange(len(self.places), device=values.device)  # of group 0, flat
        self.coupled = self._coupled()
        alike = self._paired(keep.to(values.dtype).sub_(0.5), torch.add)  # 1: both kept, -1: both pruned, 0: one kept
        prohibitive = torch.finfo(values.dtype).max
        self.joint = torch.addcmul(self.coupled, alike, alike, value=prohibitive, out=alike)

    @property
    def steps(self) -> Sequence[Step]:
        """The best pair of all, which leaves nothing out."""
        return [self._best_pair]

    def _coupled(self) -> Tensor:
        gram = self.gram.view(self.groups, self.group_size, self.group_size, self.groups)
        gram = gram.diagonal(dim1=0, dim2=3)  # of each group: (place, place, group)
        alone = self.values.square() * gram.diagonal(dim1=0, dim2=1).t().flatten()
        one, other = self.places.unbind(1)
        products = self._paired(self.values, torch.mul)
        return self._paired(alone, torch.add).addcmul_(products, gram[one, other], value=-2)

    def _paired(self, tensor: Tensor, combine: Callable[..., Tensor]) -> Tensor:
        """Combine the two members of all pairs of a (rows, width) tensor: (rows, pairs, groups)."""
        members = tensor.view(self.members_shape)
        paired = tensor.new_empty((len(tensor), len(self.places), self.groups))
        partners = list(range(self.group_size - 1, 0, -1))  # of each place: those behind it
        for place, part in enumerate(paired.split(partners, dim=1)):
            combine(members[:, place, None], members[:, place + 1 :], out=part)
        return paired

    def _best_pair(self) -> Tensor:
        costs = self._paired(self.slopes, torch.add).add_(self.joint).flatten(1)
        best = lowest_column(costs)
        better = costs.gather(1, best[:, None])[:, 0] < 0
        places = best // self.groups  # index of the pair's places
        group = (best - self.first_pairs.index_select(0, places))[:, None]
        pair = self.columns.index_select(0, places) + group
        pair_slopes = self.slopes.gather(1, pair)
        factors, _ = self.flip(pair, better)
        one, other = (group * self.group_size + self.places.index_select(0, places)).unbind(1)  # rows of G
        change = self.gram.index_select(0, one).mul_(factors[:, :1])
        change.addcmul_(self.gram.index_select(0, other), factors[:, 1:])  # of c
        self.slopes.scatter_add_(1, pair, pair_slopes.mul_(better[:, None]).mul_(-2))
        self.slopes.addcmul_(self.turn, change)
        self._update_joint(group)
        return better

    def _update_joint(self, group: Tensor) -> None:
        """Take over the keep masks of one group of each row, (rows, 1), into `joint`."""
        one, other = (self.keep.gather(1, group + columns) for columns in self.columns.t())
        at = group + self.first_pairs
        coupled = self.coupled.flatten(1).gather(1, at)
        self.joint.flatten(1).scatter_(1, at, coupled.masked_fill_(torch.eq(one, other), torch.inf))
