"""Where calibration windows start in a text."""

import torch
from torch import Tensor


def window_offsets(tokens: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw where `samples` windows of a text of `tokens` tokens start, (samples,) int64, in [0, tokens - length].

    The text has room for F = floor(tokens / length) windows. No two of the first F overlap, nor of the next F.
    """
    room = tokens // length
    parts = []
    for first in range(0, samples, room):
        parts.append(disjoint_offsets(tokens, min(room, samples - first), length, generator))
    return torch.cat(parts)


def disjoint_offsets(tokens: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw where `samples` disjoint windows start, (samples,) int64, in random order; all ways are equally likely.

    Independent starts are such a draw if no two windows happen to overlap. Otherwise the text is taken as a row of
    slots, each a window or a single token between windows, and the windows' slots are drawn.
    """
    starts = torch.randint(0, tokens - length + 1, (samples,), generator=generator)
    if bool((starts.sort().values.diff() >= length).all()):
        return starts
    slots = torch.randperm(tokens - samples * (length - 1), generator=generator)[:samples].sort().values
    starts = slots + torch.arange(samples) * (length - 1)
    return starts[torch.randperm(samples, generator=generator)]
