"""Where calibration windows start in a text."""

import torch
from torch import Tensor


def window_offsets(tokens: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Where `samples` windows of a text of `tokens` tokens start, (samples,) int64, in [0, tokens - length].

    Of the F = floor(tokens / length) windows that the text has room for no two overlap; of more windows than F, no two
    of the first F overlap, nor of the next F.
    """
    room = tokens // length
    counts = [min(room, samples - done) for done in range(0, samples, room)]
    return torch.cat([disjoint_offsets(tokens, count, length, generator) for count in counts])


def disjoint_offsets(tokens: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Where `samples` disjoint windows start, (samples,) int64, in random order; all ways are equally likely.

    Starts drawn one by one are such a draw where no two windows happen to overlap. Otherwise the text is drawn as a
    row of windows, each as one slot, and of single tokens between them.
    """
    starts = torch.randint(0, tokens - length + 1, (samples,), generator=generator)
    if bool((starts.sort().values.diff() >= length).all()):
        return starts
    slots = torch.randperm(tokens - samples * (length - 1), generator=generator)[:samples].sort().values
    starts = slots + torch.arange(samples) * (length - 1)
    return starts[torch.randperm(samples, generator=generator)]
