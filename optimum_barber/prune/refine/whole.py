"""The whole model on trial, as one block from tokens to what its head is given, by how far its next token strays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import BarberError
from ...base.ranks import ALONE, Ranks
from ...models.activations import Activations
from ...models.calls import call_reaching
from ...tensors.patterns import SparsityPattern
from ..block_cache import BlockCache
from ..trial import Trial
from .grams import SameInputs, inputs_shown
from .place import Needs, place_of_sums

COPIES_OF_LOGITS = 10  # dense and sparse, their logarithms, probabilities and gradients, as measured


@torch.no_grad()
def trial_of(
    model: Any, linears: Mapping[str, nn.Linear], windows: Tensor, pattern: SparsityPattern, ranks: Ranks = ALONE
) -> Trial:
    """The dense causal LM on trial by the divergence of its next token, its own output as target.

    Each of several ranks holds consecutive `windows`. Sums wait in host memory where the device has no room for them.

    Raises:
        BarberError: the model gives NaN or Inf, or makes more of its head's output than is known here; memory is short.
    """
    if model.get_output_embeddings() is None:
        raise BarberError(f"model is a {type(model).__name__}, without a language-modelling head: give the causal LM")
    forward, logits = partial(_before_head, model), _logits_of(model)
    share = ranks.share(len(windows))
    inputs = Activations(windows[share.slice].to(next(model.parameters()).device).split(1), share=share)
    first = next(iter(inputs))
    same = SameInputs()
    with inputs_shown(linears, same.note):
        expected = model(input_ids=first, use_cache=False).logits
    if not expected.isfinite().all():
        raise BarberError("base gives NaN or Inf: its weights hold some")
    hidden = forward(first)
    if not torch.allclose(expected, logits(hidden), rtol=1e-3, atol=1e-3):
        raise BarberError(f"{type(model).__name__} makes more of its head's output than refine knows: not supported")
    needs = Needs.of(linears, same.first(), len(inputs) * hidden.nbytes + COPIES_OF_LOGITS * expected.nbytes)
    sums_on = place_of_sums(needs, hidden.device, ranks)
    targets = inputs.like(forward(x) for x in inputs)
    objective = Divergence(logits)
    return Trial(forward, dict(linears), inputs, targets, pattern, objective=objective, ranks=ranks, sums_on=sums_on)


def _before_head(model: Any, window: Tensor) -> Tensor:
    # (1, length, hidden), without running the head
    return call_reaching(model.get_output_embeddings(), lambda: model(input_ids=window, use_cache=False)).hidden


def _logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    # the cap on the head's output that some families have (Gemma 2)
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        scores: Tensor = head(hidden)
        return scores if cap is None else cap * torch.tanh(scores / cap)

    return logits


def part_of(trial: Trial, samples: Sequence[int]) -> Trial:
    """The same on some of the samples of all ranks, by their ascending indices."""
    inputs, targets = trial.inputs.some(samples), trial.targets.some(samples)
    return replace(trial, inputs=inputs, targets=targets, cache=BlockCache())


@dataclass(frozen=True)
class Divergence:
    """KL(dense || sparse) of the next token, in nats a token: an objective of hidden states, (1, tokens, hidden).

    For a small change dz of the logits, twice the divergence from the model's own distribution p is dz^T F dz, F the
    Fisher matrix of p, which is E u u^T for u = d log p(y) / dz and tokens y drawn from p. `logits` is the head.
    """

    logits: Callable[[Tensor], Tensor]

    def error(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over tokens, a scalar; the target's distribution is held constant."""
        sparse = self.logits(output).log_softmax(-1)
        with torch.no_grad():
            dense = self.logits(target).log_softmax(-1)
        tokens = (dense.exp() * (dense - sparse)).sum(-1, keepdim=True)
        return (tokens if weights is None else tokens * weights).mean()

    def units(self, output: Tensor) -> float:
        """Sums are of twice the divergence, over tokens."""
        return 2 * output[..., 0].numel()

    def probe(self, output: Tensor, weights: Tensor | None, seed: int) -> Tensor:
        """The gradient of the log-probability of one drawn token a place, by the hidden states."""
        with torch.enable_grad():
            hidden = output.detach().requires_grad_()
            likely = self.logits(hidden).log_softmax(-1)
            drawn = drawn_from(likely.detach(), seed)
            scores = likely.gather(-1, drawn)
            if weights is not None:
                scores = scores * weights.sqrt()
            (gradient,) = torch.autograd.grad(scores.sum(), hidden)
        return gradient


def drawn_from(likely: Tensor, seed: int) -> Tensor:
    """One token a place out of log-probabilities (1, tokens, vocabulary), (1, tokens, 1); drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    chances = likely[0].exp().cpu()
    return torch.multinomial(chances, 1, generator=generator)[None].to(likely.device)
