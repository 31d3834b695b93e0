"""Checkpoints that model arguments of lm-eval mean, made once and kept by the fingerprint of all that decides them."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from pydantic import BaseModel

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.write import software
from optimum_barber.models.device import choose_device
from optimum_barber.models.loading import ModelReference

CACHE_VARIABLE = "OPTIMUM_BARBER_CACHE"


def device_at_hand(device: Any) -> str:
    """The evaluation's device; what there is where it is not at hand, as lm-eval does."""
    try:
        return str(choose_device(str(device or "auto")))
    except BarberError:
        return str(choose_device("auto"))


def items(value: Any) -> list[str]:
    """A list out of `[a,b]`, which lm-eval leaves a string, or of a single name."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = [part.strip().strip("'\"") for part in value[1:-1].split(",")]
    return [str(item) for item in (value if isinstance(value, list | tuple) else [value])]


def cached(key: str, record: str, make: Callable[[Path], object]) -> Path:
    """The directory of `key`, filled by `make` unless it holds the file `record`, which is there when all is.

    The cache is the environment variable OPTIMUM_BARBER_CACHE, or `optimum_barber` in the Hugging Face home.

    Raises:
        BarberError: the cache cannot be written.
    """
    directory = Path(os.environ.get(CACHE_VARIABLE) or Path(HF_HOME) / "optimum_barber") / key
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BarberError(
            f"cache {directory.parent} cannot be written ({error.strerror}): set {CACHE_VARIABLE}"
        ) from None
    with FileLock(f"{directory}.lock"):  # one process works where several are launched
        if not (directory / record).is_file():
            make(directory)
    return directory


def cache_key(reference: ModelReference, config: BaseModel, device: str, read: Iterable[Path], makers: Any) -> str:
    """Fingerprint of all that decides a result: settings, the files read, the code of the functions that make it."""
    from optimum_barber.base.fingerprint import digest, of_path
    from optimum_barber.runs.recipe.fingerprint import of_model

    content = {
        "settings": config.model_dump(mode="json", exclude={"device", "batch_size"}),
        "device": torch.device(device).type,
        "model": [reference.full_name, of_model(reference.name)],
        "files": {str(path.absolute()): of_path(str(path)) for path in read if path != reference.path},
        "makers": [of_path(str(sys.modules[inspect.unwrap(maker).__module__].__file__)) for maker in makers],
        "software": software(),
    }
    return digest(content)[:32]
