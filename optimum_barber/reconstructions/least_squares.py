"""Least squares for each Linear, its mask fixed, from Gram matrices."""

from typing import Any

from ..config import ReconstructConfig
from ..least_squares import solve
from ..quadratic import closing_linear, quadratics
from ..trial import Trial
from . import RECONSTRUCTIONS


@RECONSTRUCTIONS.register("least-squares")
def least_squares(trial: Trial, config: ReconstructConfig) -> dict[str, Any]:
    """First all Linears but the one that closes the block, each by its own output's error; then that one, by E."""
    closing = closing_linear(trial)
    others = [name for name in trial.linears if name != closing]
    accepted = []
    for names in filter(None, (others, [closing] if closing else [])):
        solved = {}
        for name, found in quadratics(trial, trial.masks, names).items():
            values, keep = trial.values(name), trial.masks[name]
            solved[name] = trial.ranks.spread(
                lambda rows, v=values, m=keep, q=found: solve(
                    v[rows], m[rows], q.gram, q.correlation[rows], config.iterations, config.damping
                ),
                values,
            )
        accepted.append(trial.adopt(solved))
    return {"accepted": accepted}
