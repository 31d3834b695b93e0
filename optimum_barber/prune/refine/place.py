"""Where the sums of a refinement wait: on the device of the model, or in host memory."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from ...base.devices import empty_cache
from ...base.errors import BarberError
from ...base.memory import free_memory
from ...base.ranks import Ranks

logger = logging.getLogger(__name__)

SUM = 8  # bytes of an entry of a float64 sum, of a gradient or a Gram matrix
WORKING = 7  # bytes a weight beside the sums: under masks in float32, and masks of now, of a candidate, the best
FOR_THE_PASS = 0.2  # share of the device's memory for the activations and logits of one window
GB = 1e9


def place_of_sums(
    linears: Mapping[str, nn.Linear], same_inputs: Mapping[str, str], ranks: Ranks
) -> torch.device | None:
    """The CPU if on any rank the device has no room for the sums beside the weights, which are there; else None.

    Args:
        same_inputs: by Linear, the first one with its input, whose Gram matrix it shares.

    Raises:
        BarberError: the host has no room for what waits there.
    """
    device = next(iter(linears.values())).weight.device
    weights = sum(linear.weight.numel() for linear in linears.values())
    entries = sum(linears[name].in_features ** 2 for name in set(same_inputs.values()))
    sums = SUM * (weights + entries)
    everything = sums + WORKING * weights
    if device.type == "cpu":
        _check_host(everything, ranks)
        return None
    empty_cache()
    free = free_memory(device)
    if not _on_any(ranks, free is not None and everything > (1 - FOR_THE_PASS) * free):
        return None
    _check_host(sums, ranks)
    logger.info("gradients and Gram matrices, %.1f GB, wait in host memory", sums / GB)
    return torch.device("cpu")


def _check_host(needed: int, ranks: Ranks) -> None:
    free = free_memory()
    if not _on_any(ranks, free is not None and ranks.local * needed > free):
        return
    processes = "" if ranks.local == 1 else f" for each of {ranks.local} processes"
    raise BarberError(
        f"gradients and Gram matrices take {needed / GB:.1f} GB of host memory{processes}, more than is free: use a "
        "machine with more, or start fewer processes on it"
    )


def _on_any(ranks: Ranks, condition: bool) -> bool:
    return any(ranks.gather([float(condition)]))
