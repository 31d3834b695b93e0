"""Fingerprints of models and of the checkpoints that settings make of them."""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from ..base.files import digest, path_digest
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
    """Digest names, sizes and times of a model's files; reading 100 GB would take minutes."""
    reference = resolve_model(name)
    files = [reference.path] if reference.gguf_file else sorted(reference.directory.iterdir())
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def of_checkpoint(
    reference: ModelReference, config: BaseModel, device: str, read: Iterable[Path], makers: Iterable[Any]
) -> str:
    """Digest all that decides a checkpoint: the content of the files `read` and the code of the functions `makers`."""
    content = {
        "settings": config.model_dump(mode="json", exclude={"device", "batch_size"}),
        "device": torch.device(device).type,
        "model": [reference.full_name, of_model(reference.name)],
        "files": {str(path.absolute()): path_digest(str(path)) for path in read if path != reference.path},
        "makers": [path_digest(str(sys.modules[inspect.unwrap(maker).__module__].__file__)) for maker in makers],
        "software": software(),
    }
    return digest(content)[:32]


def of_pruned(reference: ModelReference, config: BarberConfig, device: str) -> str:
    """Digest all that decides a pruned checkpoint: settings, files read, code of whoever makes the masks."""
    makers: list[Any] = [as_producer(config.producer).function]
    makers += [REBUILDERS[name] for name in config.rebuild.chain]
    allocation = EFFORTS[config.effort].allocation if config.allocation == AUTO else config.allocation
    makers.append(ALLOCATIONS[allocation])
    makers += [RECONSTRUCTIONS[name] for name in config.reconstruct.chain]
    return of_checkpoint(reference, config, device, BarberSparsifier(None).inputs(config), makers)
