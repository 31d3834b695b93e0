"""Pruned models in lm-eval."""
