"""Exchanges by the divergence of the whole sparse model from the dense one, on masks that are there already."""
