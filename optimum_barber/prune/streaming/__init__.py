"""Pruning from disk to disk, one decoder layer in memory."""
