"""Quantization that keeps masks, by compressed-tensors."""
