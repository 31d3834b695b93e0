"""Tasks of lm-eval, its own and local files, on a model in memory or by name."""
