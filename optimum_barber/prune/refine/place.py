"""Where the sums of a refinement wait: on the device of the model, or in host memory."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...base.devices import empty_cache
from ...base.errors import BarberError
from ...base.memory import free_memory
from ...base.ranks import Ranks
from ..cost.needs import spelled

logger = logging.getLogger(__name__)

SUM = 8  # bytes a weight of the running gradient, in float64
GRAM = 4  # bytes an entry of a Gram matrix: in float32, or in float64 of a half
WORKING = (
    9  # bytes a weight beside the sums: under masks in float32; masks as given, the best, and those that are tried
)
FOR_THE_PASS = 0.2  # share of the memory for the activations of one window, beside its logits


@dataclass(frozen=True)
class Needs:
    """Bytes that a refinement takes beside the dense model.

    Attributes:
        sums: running gradients and Gram matrices, which may wait in host memory.
        work: weights under masks, and masks.
        outputs: what the dense model gives for all windows of a rank, and copies of one window's logits.
    """

    sums: int
    work: int
    outputs: int

    @classmethod
    def of(cls, linears: Mapping[str, nn.Linear], same_inputs: Mapping[str, str], outputs: int) -> "Needs":
        """Those of Linears, of which each shares the Gram matrix of the first one with its input."""
        weights = sum(linear.weight.numel() for linear in linears.values())
        widths = [linears[name].in_features for name in set(same_inputs.values())]
        entries = sum(width**2 for width in widths) + max(widths) ** 2  # one more while it is summed up
        return cls(SUM * weights + GRAM * entries, WORKING * weights, outputs)


def place_of_sums(needs: Needs, device: torch.device, ranks: Ranks) -> torch.device | None:
    """The CPU if on any rank the device has no room for the sums beside the rest; else None.

    Raises:
        BarberError: the device has no room for the rest, or the host none for what waits there.
    """
    everything = needs.sums + needs.work + needs.outputs
    host = torch.device("cpu")
    if device.type == "cpu":
        _check(host, everything, ranks)
        return None
    if not _is_short(device, everything, ranks):
        return None
    _check(device, needs.work + needs.outputs, ranks)
    _check(host, needs.sums, ranks)
    logger.info("gradients and Gram matrices, %s, wait in host memory", spelled(needs.sums))
    return host


def _check(device: torch.device, needed: int, ranks: Ranks) -> None:
    if not _is_short(device, needed, ranks):
        return
    free = _free(device, ranks)
    left = "less" if free is None else spelled(int((1 - FOR_THE_PASS) * free))
    advice = "shorter windows or a larger machine"
    if ranks.local > 1:
        advice += ", or fewer processes on it"
    raise BarberError(
        f"refine takes {spelled(needed)} of the memory of {device} beside the model and one window's activations, and "
        f"{left} is left for it: {advice}"
    )


def _is_short(device: torch.device, needed: int, ranks: Ranks) -> bool:
    """True if on any rank the memory is short; the same on all."""
    free = _free(device, ranks)
    short = free is not None and needed > (1 - FOR_THE_PASS) * free
    return any(ranks.gather([float(short)]))


def _free(device: torch.device, ranks: Ranks) -> float | None:
    """Bytes that a rank may take; those of the host are shared by all of its ranks."""
    empty_cache()
    free = free_memory(device)
    if free is None or device.type != "cpu":
        return free
    return free / ranks.local
