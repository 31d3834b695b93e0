"""Training of a pruned or shrunk model: what LoRA and recovery share, and recovery itself."""
