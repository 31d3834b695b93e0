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
        for name, found in quadratics(trial, trial.masks, names, config.shrinkage).items():
            rows = partial(_rows, trial.values(name), trial.masks[name], found, config)
            solved[name] = trial.ranks.spread(rows, trial.values(name), TILE)
        accepted.append(trial.adopt(solved))
    return {"accepted": accepted}


def _rows(values: Tensor, keep: Tensor, found: Quadratic, config: ReconstructConfig, rows: slice) -> Tensor:
    """The new values of some rows."""
    return solve(values[rows], keep[rows], found.gram, found.correlation[rows], config.iterations)
