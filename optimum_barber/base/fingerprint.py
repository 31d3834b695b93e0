"""Fingerprints of what a stage works from, so that a second run redoes only what changed."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..models.loading import resolve_model
from ..runs.recipe.stage import Stage
from ..text.sources import is_there

if TYPE_CHECKING:
    from ..runs.recipe.schema import Recipe


def digest(content: Any) -> str:
    """SHA-256 of anything that JSON can hold, keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def of_stage(recipe: "Recipe", stage: Stage, before: str) -> str:
    """The fingerprint of a stage.

    Args:
        recipe: its calibration, device and dtype count too, with the content of the texts.
        stage: its settings, with the content of the files it reads.
        before: fingerprint of what it begins with.
    """
    shared = {"calibration": recipe.calibration.model_dump(), "device": recipe.device, "dtype": recipe.dtype}
    files = [*recipe.calibration.texts, *stage.texts(), *stage.files()]
    return digest([__version__, stage.kind, stage.model_dump(), shared, before, [of_path(name) for name in files]])


def of_model(name: str) -> str:
    """The fingerprint of a model: names, sizes and times of its files; reading 100 GB would take minutes."""
    reference = resolve_model(name)
    files: Iterable[Path] = [reference.path] if reference.gguf_file else sorted(reference.directory.iterdir())
    return digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()])


def of_path(name: str) -> str:
    """The SHA-256 of a file; of a directory names, sizes and times; of anything else its name."""
    path = Path(name)
    if not is_there(path):
        return name
    if path.is_dir():
        return digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(path.iterdir()) if f.is_file()])
    return hashlib.sha256(path.read_bytes()).hexdigest()
