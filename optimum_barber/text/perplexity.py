"""Perplexity in the papers' protocol: consecutive windows, mean negative log-likelihood, exponential."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..base.calibration import CalibrationConfig
from .windows import TokenWindows, windows_for


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and all that is needed to compare it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over windows of (length - 1) predicted tokens.
        windows: how many windows were evaluated, out of all `available` consecutive ones.
        bos: whether each window begins with the BOS token.
    """

    perplexity: float
    text: str
    split: str
    sequence_length: int
    windows: int
    available: int
    dtype: str
    bos: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON; `bos` only where it is true."""
        fields = asdict(self)
        if not self.bos:
            del fields["bos"]
        return fields


@torch.no_grad()
def perplexity(model: nn.Module, windows: TokenWindows | Any, quiet: bool = False) -> Perplexity:
    """Measure the perplexity of a causal LM over windows, or token ids (windows, length), each predicted on its own.

    Raises:
        BarberError: `windows` are no token ids, or the model has no embedding for one.
    """
    if not isinstance(windows, TokenWindows):
        windows = windows_for(model, None, CalibrationConfig(), 0, windows)
    parameter = next(model.parameters())
    model.eval()
    losses = []
    for window in tqdm(windows.tokens.split(1), "perplexity", unit="window", disable=quiet or None, leave=False):
        window = window.to(parameter.device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, window[0, 1:]))
    mean = torch.stack(losses).cpu().double().mean().item()
    count, length = windows.tokens.shape
    return Perplexity(
        math.exp(min(mean, 700.0)), windows.source, windows.split, length, count, windows.available,
        str(parameter.dtype).removeprefix("torch."), windows.bos,
    )  # fmt: skip
