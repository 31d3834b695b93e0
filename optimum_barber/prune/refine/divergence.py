"""How far a sparse model's next token is from the dense one's, by the hidden states that the head is given."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """KL(dense || sparse) of the next token, in nats a token: an objective of hidden states, (1, tokens, hidden).

    For a small change dz of the logits, twice the divergence from the model's own distribution p is dz^T F dz, F the
    Fisher matrix of p, which is E u u^T for u = d log p(y) / dz and tokens y drawn from p.

    Attributes:
        logits: of hidden states, over the vocabulary.
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
