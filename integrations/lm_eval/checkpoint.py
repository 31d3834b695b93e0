"""The checkpoint that model arguments of `--model barber` mean, made once and kept in a cache."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from optimum_barber.base.errors import BarberError
from optimum_barber.base.ranks import ALONE
from optimum_barber.checkpoints.names import (
    ADAPTER_CONFIG_NAME,
    EXPERTS_NAME,
    ORDER_NAME,
    SPARSITY_NAME,
    STRUCTURE_NAME,
)
from optimum_barber.integrations.lm_eval.arguments import barber_config, shrink_config
from optimum_barber.models.loading import ModelReference, load_model, load_tokenizer, resolve_model
from optimum_barber.prune.effort import UNIFORM
from optimum_barber.prune.producers import as_producer
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.prune.sparsifier import BarberSparsifier
from optimum_barber.runs.fingerprint import of_checkpoint, of_pruned
from optimum_barber.shrink.settings import ShrinkConfig
from optimum_barber.shrink.shrinker import BarberShrinker, scoring_function

CACHE_VARIABLE = "OPTIMUM_BARBER_CACHE"  # default: `optimum_barber` in the Hugging Face home
CUTTING = set("scorer remove remove_heads remove_channels remove_experts structure".split())  # of a shrunk model
RECORDS = (SPARSITY_NAME, STRUCTURE_NAME, EXPERTS_NAME, ORDER_NAME)


def checkpoint_for(pretrained: Any, settings: Mapping[str, Any], device: Any, evaluation: Collection[str]) -> Path:
    """Return the directory that the model arguments mean: a recipe's model, an adapter, a checkpoint, perhaps made now.

    Args:
        pretrained: hub id, directory, GGUF file or `installed:PACKAGE`; None with a recipe.
        settings: the arguments that lm-eval does not know.
        device: of the evaluation; the pruning takes place there too.
        evaluation: names of the arguments that lm-eval knows, for the error.

    Raises:
        BarberError: bad arguments, or a cache that cannot be written.
    """
    if "recipe" in settings:
        return _recipe_model(pretrained, settings)
    if pretrained is None:
        raise BarberError("model 'barber' needs pretrained=MODEL, or recipe=FILE")
    if not settings and (Path(str(pretrained)) / ADAPTER_CONFIG_NAME).is_file():
        return Path(str(pretrained))
    reference = resolve_model(str(pretrained))
    if not settings and any((reference.directory / name).is_file() for name in RECORDS):
        return reference.directory
    if CUTTING & set(settings):
        return _shrunk_checkpoint(reference, shrink_config(settings, device, evaluation))
    return _pruned_checkpoint(reference, barber_config(settings, device, evaluation))


def _recipe_model(pretrained: Any, settings: Mapping[str, Any]) -> Path:
    from optimum_barber.runs.recipe import run_recipe

    others = sorted(set(settings) - {"recipe"})
    if pretrained is not None:
        others.insert(0, "pretrained")
    if others:
        raise BarberError(f"recipe={settings['recipe']} says all about the model: leave out {', '.join(others)}")
    return Path(run_recipe(str(settings["recipe"])).model)


def _pruned_checkpoint(reference: ModelReference, config: BarberConfig) -> Path:
    def make(directory: Path) -> None:
        sparsifier = BarberSparsifier.from_pretrained(reference, config.dtype)
        windows = None if _reads_text(config) else torch.zeros(1, 1).long()
        sparsifier.sparsify(config, windows, save_dir=directory, overwrite=True, ranks=ALONE)

    return _cached(of_pruned(reference, config, torch.device(config.device)), SPARSITY_NAME, make)


def _reads_text(config: BarberConfig) -> bool:
    measured = config.rebuild.chain or config.reconstruct.chain or config.allocation != UNIFORM
    return bool(config.calibration.texts or measured or as_producer(config.producer).needs)


def _shrunk_checkpoint(reference: ModelReference, config: ShrinkConfig) -> Path:
    def make(directory: Path) -> None:
        shrinker = BarberShrinker(load_model(reference, config.dtype), load_tokenizer(reference), reference)
        shrinker.shrink(config, save_dir=directory, latency=False)

    read = []
    for path in BarberShrinker(None).inputs(config):
        read.append(path / STRUCTURE_NAME if path.is_dir() else path)
    key = of_checkpoint(reference, config, torch.device(config.device), read, [scoring_function(config)])
    return _cached(key, STRUCTURE_NAME if config.remove_experts is None else EXPERTS_NAME, make)


def _cached(key: str, record: str, make: Callable[[Path], object]) -> Path:
    """Return the directory of `key`, filled by `make` unless it holds the file `record`, which is there when all is."""
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path(HF_HOME) / "optimum_barber")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BarberError(f"cache {cache} cannot be written ({error.strerror}): set {CACHE_VARIABLE}") from None
    directory = cache / key
    with FileLock(f"{directory}.lock"):  # one process works where several are launched
        if not (directory / record).is_file():
            make(directory)
    return directory
