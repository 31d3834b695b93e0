"""Calibration text in a model's own words, where there is no other."""
