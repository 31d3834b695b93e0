"""Least squares for each Linear, its mask fixed, from Gram matrices."""

from functools import partial
from typing import Any

from torch import Tensor

from ...tensors.least_squares import solve
from ..quadratic import Quadratic, in_order, quadratics
from ..settings import ReconstructConfig
from ..trial import Trial
from .base import RECONSTRUCTIONS

TILE = 128  # rows solved together: products give each row the same bits only in the same company


@RECONSTRUCTIONS.register("least-squares")
def least_squares(trial: Trial, config: ReconstructConfig) -> dict[str, Any]:
    """First all Linears but the one that closes the block, each by its own output's error; then that one, by E."""
    accepted = []
    for names in in_order(trial):
        solved = {}
        for name, model in quadratics(trial, trial.masks, names, config.shrinkage).items():
            values = trial.values(name)
            some = partial(_solve_rows, values, trial.masks[name], model, config.iterations)
            solved[name] = trial.ranks.spread(some, values, TILE)
        accepted.append(trial.adopt(solved))
    return {"accepted": accepted}


def _solve_rows(values: Tensor, keep: Tensor, model: Quadratic, iterations: int, rows: slice) -> Tensor:
    return solve(values[rows], keep[rows], model.gram, model.correlation[rows], iterations)
