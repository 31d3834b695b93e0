"""Text to calibration windows, and perplexity over them."""
