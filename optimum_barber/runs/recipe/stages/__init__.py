"""The stages of a recipe, one file a step of the chain."""

from . import evaluate, permute, prune, shrink, tune  # noqa: F401 - each registers its stages
