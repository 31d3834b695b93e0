"""Model arguments of `--model barber`: what they say about the pruning, and the cached checkpoint that they mean."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from optimum_barber.base.calibration import FLAT, nested
from optimum_barber.base.errors import BarberError, unknown_name
from optimum_barber.base.fields import one_line
from optimum_barber.base.ranks import ALONE
from optimum_barber.checkpoints.names import ADAPTER_CONFIG_NAME, SPARSITY_NAME, STRUCTURE_NAME
from optimum_barber.checkpoints.record import SparsityConfig
from optimum_barber.integrations.lm_eval.cache import cache_key, cached, device_at_hand, items
from optimum_barber.integrations.lm_eval.shrink import CUTTING, shrink_config, shrunk_checkpoint
from optimum_barber.models.loading import ModelReference, resolve_model
from optimum_barber.prune.allocations import as_allocation
from optimum_barber.prune.effort import AUTO, EFFORTS, UNIFORM
from optimum_barber.prune.producers import as_producer
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.rebuilders import REBUILDERS
from optimum_barber.prune.reconstructions import RECONSTRUCTIONS
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.prune.sparsifier import BarberSparsifier

EVALUATION = {"device", "dtype", "batch_size"}  # of the evaluation where lm-eval is told; none of them decides masks
REBUILD = {"rebuild" if name == "method" else name for name in RebuildConfig.model_fields}
SETTINGS = (set(BarberConfig.model_fields) - EVALUATION) | REBUILD | set(FLAT)
LISTS = ("calibration", "ignore")


def checkpoint_for(pretrained: Any, settings: Mapping[str, Any], device: Any, evaluation: Collection[str]) -> Path:
    """The directory that the model arguments mean: a recipe's model, a finished one, an adapter, one made as told.

    Args:
        pretrained: hub id, directory, GGUF file or `installed:PACKAGE`; None with a recipe.
        settings: the arguments that lm-eval does not know.
        device: of the evaluation; the pruning takes place there too.
        evaluation: names of the arguments that lm-eval knows, for the error.

    Raises:
        BarberError: bad arguments.
    """
    if "recipe" in settings:
        return _recipe_model(pretrained, settings)
    if pretrained is None:
        raise BarberError("model 'barber' needs pretrained=MODEL, or recipe=FILE")
    if not settings and (Path(str(pretrained)) / ADAPTER_CONFIG_NAME).is_file():
        return Path(str(pretrained))
    reference = resolve_model(str(pretrained))
    if not settings and any((reference.directory / name).is_file() for name in (SPARSITY_NAME, STRUCTURE_NAME)):
        return reference.directory
    if CUTTING & set(settings):
        return shrunk_checkpoint(reference, shrink_config(settings, device, evaluation))
    return pruned_checkpoint(reference, barber_config(settings, device, evaluation))


def _recipe_model(pretrained: Any, settings: Mapping[str, Any]) -> Path:
    from optimum_barber.runs.recipe import run_recipe

    others = [*(["pretrained"] if pretrained is not None else []), *sorted(set(settings) - {"recipe"})]
    if others:
        raise BarberError(f"recipe={settings['recipe']} says all about the model: leave out {', '.join(others)}")
    return Path(run_recipe(str(settings["recipe"])).model)


def barber_config(settings: Mapping[str, Any], device: Any = None, evaluation: Collection[str] = ()) -> BarberConfig:
    """The configuration that flat arguments mean, as on the command line: `rebuild` is the method.

    `masks=FILE` without a producer stands for these masks as they are: producer `masks`, rebuild `none`.

    Raises:
        BarberError: an argument that nobody takes, or a value that is not legal.
    """
    given = dict(settings)
    if "masks" in given and "producer" not in given:
        given = {"producer": "masks", "rebuild": "none", **given}
    own = as_producer(str(given.get("producer", "wanda"))).arguments
    for name in given:
        if name not in SETTINGS | set(own):
            raise unknown_name("model argument", name, {*SETTINGS, *own, *evaluation, "pretrained", "recipe"})
    rebuild = {"method" if name == "rebuild" else name: given[name] for name in REBUILD & set(given)}
    arguments = {name: given[name] for name in own if name in given and name not in SETTINGS}
    lists = {name: items(given[name]) for name in LISTS if name in given}
    rest = {name: value for name, value in given.items() if name in SETTINGS - REBUILD - {"producer_args"}}
    try:
        merged = {**given.get("producer_args", {}), **arguments}
        return BarberConfig(
            **nested({**rest, **lists}), producer_args=merged, rebuild=rebuild, device=device_at_hand(device)
        )
    except TypeError:
        raise BarberError(f"producer_args {given['producer_args']!r} is not legal: {{'NAME': VALUE}}") from None
    except ValidationError as error:
        raise one_line(error) from None


def pruned_checkpoint(reference: ModelReference, config: BarberConfig) -> Path:
    """The checkpoint pruned by `config`, from the cache where exactly this was done before."""

    def make(directory: Path) -> None:
        sparsifier = BarberSparsifier.from_pretrained(reference, config.dtype)
        windows = None if _reads_text(config) else torch.zeros(1, 1).long()
        sparsifier.sparsify(config, windows, save_dir=directory, overwrite=True, ranks=ALONE)

    return cached(pruning_key(reference, config, config.device), SPARSITY_NAME, make)


def pruning_key(reference: ModelReference, config: BarberConfig, device: str) -> str:
    """Fingerprint of all that decides a pruned checkpoint: settings, files read, code of whoever makes the masks."""
    makers: list[Any] = [as_producer(config.producer).function, *(REBUILDERS[name] for name in config.rebuild.chain)]
    allocation = EFFORTS[config.effort].allocation if config.allocation == AUTO else config.allocation
    makers.append(as_allocation(allocation).function)
    makers += [RECONSTRUCTIONS[name] for name in config.reconstruct.chain]
    return cache_key(reference, config, device, BarberSparsifier(None).inputs(config), makers)


def _reads_text(config: BarberConfig) -> bool:
    """Whether calibration text has any say, or was asked for."""
    measured = config.rebuild.chain or config.reconstruct.chain or config.allocation != UNIFORM
    return bool(config.calibration.texts or measured or as_producer(config.producer).needs)


def sparsity_summary(record: SparsityConfig) -> dict[str, Any]:
    """What a table of results must say of a pruned model."""
    return {
        "base_model": record.base_model["name"],
        "pattern": record.pattern,
        "sparsity": record.sparsity,
        "producer": record.producer,
        "rebuild": record.rebuild,
        "mask_fingerprint": record.fingerprint,
        "steps": record.steps,
    }
