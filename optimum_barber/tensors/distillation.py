"""The divergence of a sparse model's next token from the dense model's, as a loss with its gradient. Torch only."""

from typing import Any

import torch
from torch import Tensor

TOKENS = 128  # whose distributions are held at once, in float32


class _Divergence(torch.autograd.Function):
    """Computes the gradient beside the loss, so that no distribution outlives its piece of tokens."""

    @staticmethod
    def forward(ctx: Any, sparse: Tensor, dense: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        gradient = torch.empty_like(sparse)
        pieces = zip(sparse.split(TOKENS), dense.split(TOKENS), gradient.split(TOKENS), strict=True)
        for sparse_piece, dense_piece, gradient_piece in pieces:
            log_q = (sparse_piece.float() / temperature).log_softmax(-1)
            log_p = (dense_piece.float() / temperature).log_softmax(-1)
            p = log_p.exp()
            distance = (log_p - log_q).masked_fill_(p == 0, 0)  # of tokens that neither model can give: both are -inf
            total += (p * distance).sum().cpu()
            gradient_piece.copy_(log_q.exp_().sub_(p))
        tokens = max(len(sparse), 1)
        ctx.save_for_backward(gradient)
        ctx.scale = temperature / tokens
        loss: Tensor = temperature**2 * total / tokens
        return loss.to(sparse.device, torch.float32)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * (ctx.scale * outer).to(gradient.dtype), None, None


def divergence(sparse: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(p || q), p = softmax(dense / T), q = softmax(sparse / T), the mean over tokens, in nats.

    The factor T^2 keeps the size of the gradient, which is T (q - p) / tokens by the sparse logits (Hinton 2015).

    Args:
        sparse: logits, (..., vocabulary), of any floating dtype; the gradient goes to them alone.
        dense: logits of the same shape.
        temperature: T > 0; above 1 the rare tokens count for more.

    Returns:
        A scalar, float32, at least 0 up to rounding; 0 without tokens.
    """
    width = sparse.shape[-1]
    loss: Tensor = _Divergence.apply(sparse.reshape(-1, width), dense.reshape(-1, width), temperature)
    return loss
