"""SparseGPT (arXiv 2301.00774): optimal brain surgery, column by column in blocks of 128."""

import logging

import torch
from torch import Tensor

from ...base.errors import BarberError
from ...tensors.masks import keep_highest, select_lowest
from ...tensors.patterns import SparsityPattern
from .base import LinearInput, Produced, producer

logger = logging.getLogger(__name__)
ATTEMPTS = 4


@producer("sparsegpt", needs=["gram"])
def sparsegpt(linear: LinearInput, *, damping: float = 0.01, block_size: int = 128, update: bool = True) -> Produced:
    """Score W_ij^2 / U_jj^2 within blocks of columns and push each pruned weight's error to later columns.

    U is the upper Cholesky factor of (H + lambda I)^-1, H = sum x x^T, lambda = damping * mean(diag H). With
    `update` the kept weights keep the values that make up for the pruned ones; without, only the mask is
    taken and kept weights stay dense.
    """
    if not 0 < damping < float("inf"):
        raise BarberError(f"damping {damping} of producer 'sparsegpt' is not legal: a number above 0")
    if block_size < 1:
        raise BarberError(f"block_size {block_size} of producer 'sparsegpt' is not legal: at least 1")
    assert linear.statistics.gram is not None
    gram = linear.statistics.gram.clone()
    weight = linear.weight.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    factor = inverse_factor(gram, damping, linear.name)
    size = block_size
    if linear.pattern.semi_structured:
        size = max(block_size // linear.pattern.group, 1) * linear.pattern.group
    keep = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], size):
        columns = slice(start, start + size)
        count = linear.pattern.pruned_between(keep[:, :start].numel(), keep[:, : start + size].numel())
        errors = _prune_columns(weight[:, columns], keep[:, columns], factor[columns, columns], linear.pattern, count)
        weight[:, start + size :] -= errors @ factor[columns, start + size :]
    return Produced(keep, weight if update else None)


def inverse_factor(gram: Tensor, damping: float, name: str) -> Tensor:
    """Upper Cholesky factor of (H + lambda I)^-1; the damping is raised tenfold where that fails, a few times."""
    mean = gram.diagonal().mean()
    for attempt in range(1, ATTEMPTS + 1):
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        if attempt < ATTEMPTS:
            logger.warning("Cholesky failed for %s at damping %g; trying %g", name, damping, damping * 10)
            damping *= 10
    raise BarberError(f"Cholesky fails for {name} up to damping {damping:g}; give a larger damping=")


def _prune_columns(weight: Tensor, keep: Tensor, factor: Tensor, pattern: SparsityPattern, count: int) -> Tensor:
    """Prune `count` weights, or N:M, of a block of columns in place; scaled errors, (out, columns), for the next."""
    diagonal = factor.diagonal()
    if not pattern.semi_structured:
        scores = (weight / diagonal).square_()
        keep.copy_(~select_lowest(scores.reshape(1, -1), count).reshape(keep.shape))
    errors = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        if pattern.semi_structured and column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            keep[:, group] = keep_highest((weight[:, group] / diagonal[group]).square_(), pattern)
        errors[:, column] = weight[:, column] * ~keep[:, column] / diagonal[column]
        weight[:, column] *= keep[:, column]
        weight[:, column + 1 :].addr_(errors[:, column], factor[column, column + 1 :], alpha=-1)
    return errors
