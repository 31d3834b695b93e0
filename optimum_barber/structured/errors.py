"""How far a smaller model's hidden states are from the dense model's, decoder layer by decoder layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import architecture_of, decoder_stack


@torch.no_grad()
def layer_errors(model: nn.Module, small: nn.Module, windows: Tensor) -> list[float]:
    """||h_small - h||² / ||h||² of every decoder layer's output, over all windows.

    Args:
        model: the dense model.
        small: what was cut out of it, on the same device.
        windows: (samples, length) int64.
    """
    device = next(model.parameters()).device
    away: list[float] = []
    norms: list[float] = []
    with _outputs(model) as dense, _outputs(small) as cut:
        for window in windows.to(device).split(1):
            for each in (model, small):
                each(input_ids=window, use_cache=False)
            for index, (h, other) in enumerate(zip(dense, cut, strict=True)):
                if len(away) == index:
                    away.append(0.0)
                    norms.append(0.0)
                away[index] += (other - h).double().square().sum().item()
                norms[index] += h.double().square().sum().item()
            dense.clear()
            cut.clear()
    return [error / max(norm, torch.finfo(torch.float64).tiny) for error, norm in zip(away, norms, strict=True)]


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every decoder layer's output goes to."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in decoder_stack(model, architecture_of(model))[1]]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
