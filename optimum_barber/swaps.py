"""Exchanges of one kept against one pruned weight of a row, by the Gram matrix of the row's input. Torch only.

SparseSwaps (arXiv 2512.10922; METHODS: Swaps). A row of weights v under the keep mask m, with input x and
target t, has the error e = sum over tokens of (t - (v * m) x)^2. With G = sum of x x^T and the correlation
c = sum of (t - (v * m) x) x, pruning the kept i and growing the pruned j changes it by exactly

    2 v_i c_i + v_i^2 G_ii  -  2 v_j c_j + v_j^2 G_jj  -  2 v_i v_j G_ij,

and c then by v_i G_i - v_j G_j. Rows are independent. One exchange costs O(rows * width).
"""

import torch
from torch import Tensor

from .selection import lowest

TOGETHER = 2**17  # weights worked on at once on the CPU: what an exchange touches stays in the cache
TOGETHER_ON_DEVICE = 2**23  # elsewhere: few steps, each of them large
PAIRS = 2**24  # examined at once where every pair of a row is
LEG = 20  # steps after which rows that have nothing more to gain are left aside


def exchange(
    values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, most: int | None, group: int | None = None
) -> Tensor:
    """The keep mask after up to `most` improving exchanges in each row.

    In turn, the pruned weight that gains most alone is grown and the kept one that suits it best goes, or the kept
    one that costs least alone goes and the pruned one that suits it best is grown; inside M-groups the best pair is
    taken.

    Args:
        values: v, (rows, width) float: what a weight is worth where it is kept.
        keep: m, (rows, width) bool.
        gram: G, (width, width), of the dtype of `values`.
        correlation: c, (rows, width), of the residual at m with the input.
        most: steps a row, of one exchange at most; None for as many as there are, until no pair of any row improves.
        group: M of an N:M pattern, whose exchanges stay within M consecutive weights; None for none.

    Returns:
        (rows, width) bool, every row (every M-group) with as many kept as before.
    """
    if group is None:
        return _exchanged(values, keep, gram, correlation, most, None)
    # the same place of all M-groups side by side, so that pairs are formed along long rows
    order = torch.arange(values.shape[1], device=values.device).view(-1, group).t().reshape(-1)
    ordered = values[:, order], keep[:, order], gram[order][:, order], correlation[:, order]
    return _exchanged(*ordered, most, group)[:, order.argsort()]


def _exchanged(
    values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, most: int | None, group: int | None
) -> Tensor:
    """The keep mask, leg by leg; the rows are independent, so it does not matter which are worked on together."""
    keep, correlation = keep.clone(), correlation.clone()
    together = TOGETHER if values.device.type == "cpu" else TOGETHER_ON_DEVICE // (group or 1)
    going, left = torch.arange(len(keep), device=keep.device), most
    while len(going) and left != 0:
        steps, legs = LEG if left is None else min(LEG, left), []
        for rows in going.split(max(together // values.shape[1], 1)):
            leg = _Rows(values[rows], keep[rows], gram, correlation[rows], group)
            legs.append(rows[leg.run(steps, thorough=most is None)])
            keep[rows], correlation[rows] = leg.keep, leg.correlation
        going, left = torch.cat(legs), None if left is None else left - steps
    return keep


class _Rows:
    """Some rows on their way: `alone` + `turn` * c is what each weight's change of state would cost by itself."""

    def __init__(self, values: Tensor, keep: Tensor, gram: Tensor, correlation: Tensor, group: int | None) -> None:
        self.values, self.keep, self.gram, self.correlation, self.group = values, keep, gram, correlation, group
        self.each = torch.arange(len(values), device=values.device)
        self.alone = values.square() * gram.diagonal()
        self.turn = torch.where(keep, 2 * values, -2 * values)
        self.kept_only = torch.zeros_like(values).masked_fill_(~keep, torch.inf)
        self.pruned_only = torch.zeros_like(values).masked_fill_(keep, torch.inf)
        self.coupling = None if group is None else self._coupling(group)

    def run(self, steps: int, thorough: bool) -> Tensor:
        """Take some steps, the ways of choosing a pair in turn; which rows may have more to gain, (rows,) bool.

        A row has come to its end when no way improves it; with `thorough`, to look at every pair is one of them.
        """
        ways = [self._grower_first, self._pruner_first, *([self._best_pair] if thorough else [])]
        ways = ways if self.coupling is None else [self._group_pair]
        idle = torch.zeros_like(self.each)
        for step in range(steps):
            costs = torch.addcmul(self.alone, self.turn, self.correlation)
            idle = torch.where(self._exchange(*ways[step % len(ways)](costs), costs), 0, idle + 1)
            if bool((idle >= len(ways)).all()):
                break
        return idle < len(ways)

    def _exchange(self, prune: Tensor, grow: Tensor, costs: Tensor) -> Tensor:
        """Prune and grow a weight of each row, (rows,) indices, where that lowers its error; where it did."""
        lost, grown = self.values[self.each, prune], self.values[self.each, grow]
        change = costs[self.each, prune] + costs[self.each, grow] - 2 * lost * grown * self.gram[prune, grow]
        change += self.kept_only[self.each, prune] + self.pruned_only[self.each, grow]
        better = change < 0
        self.correlation.addcmul_(self.gram.index_select(0, prune), (lost * better)[:, None])
        self.correlation.addcmul_(self.gram.index_select(0, grow), (grown * better)[:, None], value=-1)
        rows = better.nonzero().flatten()
        self._turn(rows, prune[rows], False)
        self._turn(rows, grow[rows], True)
        return better

    def _turn(self, rows: Tensor, columns: Tensor, kept: bool) -> None:
        self.keep[rows, columns] = kept
        self.turn[rows, columns] = -self.turn[rows, columns]
        self.kept_only[rows, columns] = 0.0 if kept else torch.inf
        self.pruned_only[rows, columns] = torch.inf if kept else 0.0

    def _grower_first(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """The pruned weight of each row that gains most alone, and the kept one that suits it: (rows,) indices."""
        grow = lowest(costs + self.pruned_only)
        return lowest(self._beside(grow, costs + self.kept_only)), grow

    def _pruner_first(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """The kept weight of each row that costs least alone, and the pruned one that suits it: (rows,) indices."""
        prune = lowest(costs + self.kept_only)
        return prune, lowest(self._beside(prune, costs + self.pruned_only))

    def _beside(self, chosen: Tensor, costs: Tensor) -> Tensor:
        """What every other weight's change costs beside that of one chosen weight of its row."""
        coupled = self.gram.index_select(0, chosen).mul_(2 * self.values[self.each, chosen][:, None])
        return torch.addcmul(costs, self.values, coupled, value=-1)

    def _coupling(self, group: int) -> Tensor:
        """2 v_i v_j G_ij within the M-groups, (rows, M, M, groups)."""
        rows, width = self.values.shape
        blocks = self.gram.view(group, width // group, group, width // group).diagonal(dim1=1, dim2=3)
        grouped = self.values.view(rows, group, -1)
        return 2 * grouped[:, :, None] * grouped[:, None] * blocks

    def _group_pair(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """The best pair within any M-group of each row, (rows,) indices."""
        assert self.coupling is not None
        rows, group, _, groups = self.coupling.shape
        prune = (costs + self.kept_only).view(rows, group, 1, groups)
        grow = (costs + self.pruned_only).view(rows, 1, group, groups)
        best = lowest((prune + grow).sub_(self.coupling).view(rows, -1))
        which = best % groups
        return best // (group * groups) * groups + which, best // groups % group * groups + which

    def _best_pair(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """The best of all pairs of each row: O(width^2) a row."""
        width = costs.shape[1]
        rows = max(PAIRS // width**2, 1)
        best = torch.cat([self._best_of(costs, some) for some in self.each.split(rows)])
        return best // width, best % width

    def _best_of(self, costs: Tensor, rows: Tensor) -> Tensor:
        prune, grow, values = (costs + self.kept_only)[rows], (costs + self.pruned_only)[rows], self.values[rows]
        pairs = prune[:, :, None] + grow[:, None, :]
        return lowest(pairs.sub_(2 * values[:, :, None] * values[:, None, :] * self.gram).flatten(1))
