"""The stages of a recipe, one file a step of the chain."""

from . import compare, evaluate, prune, quantize, refine, report, shrink, tune  # noqa: F401 - each registers its stages
