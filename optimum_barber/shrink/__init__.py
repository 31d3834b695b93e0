"""Structured pruning: whole attention heads and FFN channels go, and the model becomes smaller."""
