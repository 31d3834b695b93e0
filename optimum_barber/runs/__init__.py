"""Whole runs: evaluation, comparisons, sweeps, recipes and their reports."""
