"""Tensors in, tensors out: scores, masks, exchanges, sums. Torch only."""
