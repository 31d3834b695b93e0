"""The whole model on trial, as one block: from tokens to what its head is given."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import BarberError
from ...models.activations import Activations
from ...models.blocks import call_reaching
from ...tensors.patterns import SparsityPattern
from ..trial import Trial
from .divergence import Divergence


@torch.no_grad()
def trial_of(model: Any, linears: Mapping[str, nn.Linear], windows: Tensor, pattern: SparsityPattern) -> Trial:
    """The dense model on trial by the divergence of its next token, its own output as target.

    Args:
        model: a transformers causal LM; its weights are the dense ones.
        linears: that are pruned, by name.
        windows: (samples, length) int64.
        pattern: of the masks.

    Raises:
        BarberError: the model gives NaN or Inf, or makes more of its head's output than is known here.
    """
    forward, logits = partial(before_head, model), logits_of(model)
    inputs = Activations(windows.to(next(model.parameters()).device).split(1))
    first = next(iter(inputs))
    expected = model(input_ids=first, use_cache=False).logits
    if not expected.isfinite().all():
        raise BarberError("base gives NaN or Inf: its weights hold some")
    if not torch.allclose(expected, logits(forward(first)), rtol=1e-3, atol=1e-3):
        raise BarberError(f"{type(model).__name__} makes more of its head's output than refine knows: not supported")
    targets = inputs.like(forward(x) for x in inputs)
    return Trial(forward, dict(linears), inputs, targets, pattern, objective=Divergence(logits))


def before_head(model: Any, window: Tensor) -> Tensor:
    """The input of the head, (1, length, hidden), without running the head."""
    return call_reaching(model.get_output_embeddings(), lambda: model(input_ids=window, use_cache=False)).hidden


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """The head, and the cap on its output that some families have (Gemma 2)."""
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        scores: Tensor = head(hidden)
        return scores if cap is None else cap * torch.tanh(scores / cap)

    return logits


def part_of(trial: Trial, samples: Iterable[int]) -> Trial:
    """The same on some of the samples."""
    chosen = list(samples)
    inputs = trial.inputs.like(trial.inputs.held[index] for index in chosen)
    targets = trial.targets.like(trial.targets.held[index] for index in chosen)
    return Trial(trial.forward, trial.linears, inputs, targets, trial.pattern, objective=trial.objective)
