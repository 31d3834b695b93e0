"""Benchmarks, one command each. RESULTS.md holds their figures."""
