"""Sweeps: scorers, ratios and calibration sizes of structured pruning side by side, resumable cell by cell."""
