"""Fingerprints of models and of the checkpoints that settings make of them."""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from ..base.devices import fast_precision
from ..base.files import digest, path_digest
from ..checkpoints.carry import files_digest
from ..checkpoints.write import software
from ..models.loading import ModelReference, resolve_model
from ..prune.allocations import ALLOCATIONS
from ..prune.effort import AUTO, EFFORTS
from ..prune.producers import as_producer
from ..prune.rebuilders import REBUILDERS
from ..prune.reconstructions import RECONSTRUCTIONS
from ..prune.settings import BarberConfig
from ..prune.sparsifier import BarberSparsifier


def of_model(name: str) -> str:
    """Digest names, sizes and times of a model's files."""
    return files_digest(resolve_model(name))


def of_checkpoint(
    reference: ModelReference, config: BaseModel, device: torch.device, read: Iterable[Path], makers: Iterable[Any]
) -> str:
    """Digest all that decides a checkpoint: the content of the files `read` and the code of the functions `makers`."""
    files = {}
    for path in read:
        if path != reference.path:
            files[str(path.absolute())] = path_digest(str(path))
    code = []
    for maker in makers:
        module = sys.modules[inspect.unwrap(maker).__module__]
        code.append(path_digest(str(module.__file__)))
    content = {
        "settings": config.model_dump(mode="json", exclude={"device", "batch_size"}),
        "device": device.type,
        "precision": stated_precision(getattr(config, "precision", ""), device),
        "model": [reference.full_name, of_model(reference.name)],
        "files": files,
        "makers": code,
        "software": software(),
    }
    return digest(content)[:32]


def stated_precision(precision: str, device: torch.device) -> list[str]:
    """Return what decides the precision of products on a device: `auto` depends on what it has units for."""
    return [precision, fast_precision(device)] if precision == "auto" else [precision]


def of_pruned(reference: ModelReference, config: BarberConfig, device: torch.device) -> str:
    """Digest all that decides a pruned checkpoint: settings, files read, code of whoever makes the masks."""
    allocation = config.allocation
    if allocation == AUTO:
        allocation = EFFORTS[config.effort].allocation
    makers: list[Any] = [as_producer(config.producer).function]
    makers += map(REBUILDERS.__getitem__, config.rebuild.chain)
    makers.append(ALLOCATIONS[allocation])
    makers += map(RECONSTRUCTIONS.__getitem__, config.reconstruct.chain)
    return of_checkpoint(reference, config, device, BarberSparsifier(None).inputs(config), makers)
