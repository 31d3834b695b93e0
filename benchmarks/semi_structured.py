"""Products with torch's semi-structured tensors (2:4 zeros, CUDA) beside dense ones, in 16 bits."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from optimum_barber.models.measure import timed
from optimum_barber.tensors.masks import keep_highest
from optimum_barber.tensors.patterns import SparsityPattern

from .table import emit

TOKENS = (1, 16, 64, 256, 1024, 4096)  # at once, of a product


def faster_shapes(shapes: Sequence[tuple[int, int]], tokens: int, device: torch.device) -> set[tuple[int, int]]:
    """Print a row for each shape of Linear, (out, in); return those that are faster for `tokens`, one of `TOKENS`."""
    emit(f"| out × in, by tokens | {' | '.join(map(str, TOKENS))} |\n" + "| --- " * (len(TOKENS) + 1) + "|")
    faster = set()
    for out, width in shapes:
        gains = [gain(out, width, count, device) for count in TOKENS]
        if gains[TOKENS.index(tokens)] > 1:
            faster.add((out, width))
        emit(f"| {out} × {width} | {' | '.join(f'{g:.2f}×' for g in gains)} |")
    return faster


def gain(out: int, width: int, tokens: int, device: torch.device) -> float:
    """Seconds of the dense product over those of the semi-structured one."""
    weight = semi_structured_zeros(torch.randn(out, width, dtype=torch.bfloat16, device=device))
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    dense = median_of(lambda: functional.linear(x, weight), device)
    return dense / median_of(lambda: functional.linear(x, sparse), device)


def median_of(run: Callable[[], Tensor], device: torch.device, repeats: int = 20) -> float:
    """Seconds of one run, after three that do not count."""
    seconds = [timed(run, device)[0] for _ in range(repeats + 3)]
    return statistics.median(seconds[3:])


def semi_structured_zeros(weight: Tensor) -> Tensor:
    """The weight with the smaller two of every four set to zero."""
    return weight * keep_highest(weight.abs(), SparsityPattern.parse("2:4", None))
