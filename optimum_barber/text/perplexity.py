"""Perplexity in the papers' protocol: consecutive windows, mean negative log-likelihood, exponential."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError, FailedCheckError
from ..models.wrappers import same_modes
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
        BarberError: `windows` are no token ids, the model has no embedding for one, or gives no logits of every token.
        FailedCheckError: the perplexity is not finite.
    """
    if not isinstance(windows, TokenWindows):
        windows = windows_for(model, None, CalibrationConfig(), 0, windows)
    parameter = next(model.parameters())
    losses = []
    with same_modes(model):
        model.eval()
        for window in tqdm(windows.tokens.split(1), "perplexity", unit="window", disable=quiet or None, leave=False):
            window = window.to(parameter.device)
            logits = getattr(model(input_ids=window, use_cache=False), "logits", None)
            if logits is None or logits.shape[:-1] != window.shape:
                raise BarberError(f"model is a {type(model).__name__}, without logits of every token: give a causal LM")
            losses.append(nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:]))
    each = torch.stack(losses).cpu().double()
    mean = each.mean().item()
    if not math.isfinite(mean):
        raise FailedCheckError(
            f"perplexity on {windows.source} is not finite: window {int(each.isfinite().long().argmin())} of "
            f"{len(each)} gives NaN or Inf in {str(parameter.dtype).removeprefix('torch.')}"
        )
    count, length = windows.tokens.shape
    return Perplexity(
        math.exp(min(mean, 700.0)), windows.source, windows.split, length, count, windows.available,
        str(parameter.dtype).removeprefix("torch."), windows.bos,
    )  # fmt: skip
