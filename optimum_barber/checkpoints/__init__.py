"""Checkpoints on disk: reading, masks, records, writing, checking."""
