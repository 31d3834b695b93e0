"""BESA (arXiv 2402.16880): the share that each row prunes, learned by gradient over candidate rates. Torch only.

A row's weights are sorted by score and cut into D buckets, the lowest first. The candidate rates p_d = d / D of
d = 1 ... D - 1 have coefficients beta_d >= 0, sum_d beta_d = 1. A weight in bucket k is pruned with probability
P_k = 1 - sum_{d < k} beta_d, which falls from 1 to 0. The row's rate is alpha = sum_d beta_d p_d, the mean of P over
the buckets. The row keeps the weights with P_k < alpha.
"""

import torch
from torch import Tensor

from .masks import rank_in_group


def bucket_of(scores: Tensor, buckets: int) -> Tensor:
    """Return the bucket of every weight, (out, in) int64: 0 holds the row's lowest scores; ties go by index.

    Args:
        scores: (out, in).
        buckets: D, at most `in` of which hold a weight.
    """
    return rank_in_group(scores) * buckets // scores.shape[1]


def starting_logits(rate: float, rows: int, buckets: int) -> Tensor:
    """Return logits of beta, (rows, buckets - 1) float32, all rows alike, whose rate is `rate` within (0, 1).

    They are linear in the candidate rate, beta_d ~ exp(t d); `rate` must lie within those of the candidates.
    """
    candidates = candidate_rates(buckets, torch.float64)
    low, high = -20.0 * buckets, 20.0 * buckets
    for _ in range(100):
        slope = (low + high) / 2
        if float(torch.softmax(slope * candidates, 0) @ candidates) < rate:
            low = slope
        else:
            high = slope
    return (high * candidates).float().expand(rows, -1).clone()


def candidate_rates(buckets: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return p_d = d / D for d = 1 ... D - 1."""
    return torch.arange(1, buckets, dtype=dtype) / buckets


def keep_of_buckets(beta: Tensor) -> Tensor:
    """Return which buckets a row keeps, (rows, D) bool: those with P_k < alpha.

    Args:
        beta: (rows, D - 1), each row sums up to 1.
    """
    rates = row_rates(beta)
    later = 1 - beta.cumsum(1)
    first = torch.ones_like(later[:, :1])
    return torch.cat([first, later], 1) < rates[:, None]


def row_rates(beta: Tensor) -> Tensor:
    """Return alpha, the share that each row prunes, (rows,)."""
    return beta @ candidate_rates(beta.shape[1] + 1, beta.dtype).to(beta.device)


def beta_gradient(mask_gradient: Tensor, bucket: Tensor, buckets: int) -> Tensor:
    """Return the gradient by beta, (rows, D - 1), of a loss whose gradient by the keep mask is known.

    The threshold passes gradients straight through as M = 1 - P: dL/dbeta_d is the sum of dL/dM over the weights in the
    buckets above d.

    Args:
        mask_gradient: dL/dM, (rows, in): the weight times the gradient at it.
        bucket: of every weight, see `bucket_of`.
        buckets: D.
    """
    sums = mask_gradient.new_zeros(len(mask_gradient), buckets).scatter_add_(1, bucket, mask_gradient)
    return sums.flip(1).cumsum(1).flip(1)[:, 1:]


def softmax_gradient(beta: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient by the logits of beta = softmax(logits), given that by beta, both (rows, D - 1)."""
    return beta * (gradient - (beta * gradient).sum(1, keepdim=True))


def exact_counts(rates: Tensor, widths: Tensor, total: int) -> Tensor:
    """Return how many weights each row prunes, (rows,) int64, `total` in all.

    A row of w weights deserves (alpha + shift) w within [0, w]; the shift, the same for all, makes the sum exact. It
    gets the floor; the rest goes, one each, to the rows with the largest fractions, among equals to the first.

    Args:
        rates: alpha of each row, (rows,).
        widths: w of each row, (rows,) int64.
        total: within [0, the sum of the widths].
    """
    rates, weights = rates.double().cpu(), widths.double().cpu()
    low, high = -1.0, 1.0
    for _ in range(100):
        shift = (low + high) / 2
        if float(((rates + shift).clamp(0, 1) * weights).sum()) < total:
            low = shift
        else:
            high = shift
    due = (rates + high).clamp(0, 1) * weights
    counts = due.floor()
    counts = torch.where(due - counts > 1 - 1e-9, counts + 1, counts)  # a whole number but for rounding
    missing = total - int(counts.sum())
    fraction = due - counts
    if missing < 0:
        order = fraction.argsort(stable=True)
        counts[order[:-missing]] -= 1
    else:
        order = fraction.argsort(descending=True, stable=True)
        counts[order[:missing]] += 1
    return counts.long()
