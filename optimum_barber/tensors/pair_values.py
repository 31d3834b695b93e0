"""The distribution of mask-rebuilding-pair values in a few numbers (the paper's Fig. 3). Torch only."""

from typing import Any

import torch
from torch import Tensor

from .order import kth_smallest

BINS = 40
DECADES = 8.0  # below the largest value; what is smaller still counts into the lowest bin


def pair_value_histogram(values: Tensor, swapped: int) -> dict[str, Any] | None:
    """Positive pair values counted in bins of equal width on a log scale.

    Args:
        values: S_grow - S_prune of every ranked pair, any shape; those that are not finite and positive are left out.
        swapped: how many of them an exchange swaps.

    Returns:
        `lowest` and `highest`: the ends of the bins; `counts`: BINS integers; `cut`: the swapped-th largest value,
        to whose right lie as many pairs as are swapped, None where none are. None where no value is positive.
    """
    chosen = values[torch.isfinite(values) & (values > 0)]
    if len(chosen) == 0:
        return None
    logs = chosen.log10()
    highest = float(logs.max())
    lowest = max(float(logs.min()), highest - DECADES)
    width = (highest - lowest) / BINS or 1.0
    places = ((logs - lowest) / width).long().clamp(0, BINS - 1)
    kept = min(swapped, len(chosen))
    cut = float(kth_smallest(chosen, len(chosen) - kept + 1)) if kept else None
    counts = torch.bincount(places, minlength=BINS).tolist()
    return {"lowest": 10.0**lowest, "highest": 10.0**highest, "counts": counts, "cut": cut}
