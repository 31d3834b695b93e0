"""LLM-Barber's block-aware criterion for units: |W * dE/dW| summed over a head or a channel, measured and accepted."""

from dataclasses import replace

import torch
from torch import Tensor

from ...trial import Masks, Trial
from ..choose import highest
from ..units import Units
from . import UnitInput, scorer
from .bip import bip

STRIDE = 2  # every second sample is enough to choose between candidates


@scorer("barber", needs=["input_abs"])
def barber(given: UnitInput, *, rounds: int = 4) -> Tensor:
    """Begin with LLM-BIP's choice; exchange units by |W * dE/dW|; keep an exchange only if the block's error falls.

    At the dense weights the error is at its minimum and its gradient zero, so the gradient is taken where the units
    that go are zero, as LLM-Barber takes it at the sparse weights. The units that stay in the end score above all
    others.
    """
    trial, units = reader_alone(given), given.units
    scores = bip(given)
    kept = highest(scores, units, given.keep)
    masks = masks_of(trial, given, kept)
    for _ in range(rounds):
        sums = unit_scores(trial, given, masks)
        candidates = exchanges(sums, units, kept)
        measured = [(trial.error_on_every(STRIDE, made), other, made) for other in candidates
                    for made in [masks_of(trial, given, other)]]  # fmt: skip
        if not measured:
            break
        _, other, made = min(measured, key=lambda item: item[0])
        if trial.error(made) >= trial.error(masks):
            break
        scores, kept, masks = sums, other, made
    return above(scores, kept)


def reader_alone(given: UnitInput) -> Trial:
    """The block on trial with nothing but the Linear that reads the units."""
    assert given.trial is not None
    name = f"{given.layer}.{given.units.reader}"
    return replace(given.trial, linears={name: given.trial.linears[name]})


def masks_of(trial: Trial, given: UnitInput, kept: list[int]) -> Masks:
    """The reader's keep mask, (out, in) bool: False in the columns that read a unit that goes.

    The rows that make it stay: without rows and columns its gradient would vanish, and it could never come back.
    """
    ((name, linear),) = trial.linears.items()
    out, width = linear.weight.shape
    columns = given.units.kept(kept, width, given.units.reader, 1)
    return {name: columns.to(linear.weight.device).expand(out, width)}


def unit_scores(trial: Trial, given: UnitInput, masks: Masks) -> Tensor:
    """Sum of |W| * G over the columns that read a unit; G is the gradient of E at the masks, pruned or not (Eq. 8)."""
    ((name, gradient),) = trial.gradients(masks).items()
    return given.units.sums({given.units.reader: trial.weight(name).abs() * gradient})


def exchanges(sums: Tensor, units: Units, kept: list[int]) -> list[list[int]]:
    """Choices with the best n pairs of a unit outside and one inside exchanged, for n = N, N/2, N/4, ..., 1.

    A pair is worthwhile where the unit outside scores higher; N is how many are. Pairs stay within a group.
    """
    values, inside, each = sums.double().tolist(), set(kept), units.count // units.groups
    pairs: list[tuple[float, int, int]] = []
    for start in range(0, units.count, each):
        group = range(start, start + each)
        outs = sorted((u for u in group if u not in inside), key=lambda u: -values[u])
        ins = sorted((u for u in group if u in inside), key=lambda u: values[u])
        pairs += [(values[o] - values[i], o, i) for o, i in zip(outs, ins, strict=False) if values[o] > values[i]]
    pairs.sort(key=lambda pair: -pair[0])
    choices, count = [], len(pairs)
    while count:
        swapped = pairs[:count]
        choices.append(sorted((inside - {i for *_, i in swapped}) | {o for _, o, _ in swapped}))
        count //= 2
    return choices


def above(scores: Tensor, kept: list[int]) -> Tensor:
    """Scores in [0, 1], and the kept units' in [2, 3]."""
    ranked = scores / scores.max().clamp_min(torch.finfo(scores.dtype).tiny)
    ranked[kept] += 2
    return ranked
