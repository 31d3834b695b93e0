"""A causal LM as decoder layers: loading, architectures, blocks, replay."""
