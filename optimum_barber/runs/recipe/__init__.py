"""Recipes: one YAML file from a dense model to a pruned, tuned, quantized and evaluated one."""

from .runner import RunResult as RunResult
from .runner import run_recipe as run_recipe
