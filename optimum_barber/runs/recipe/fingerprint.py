"""Fingerprints of what a stage works from, so that a second run redoes only what changed."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...base.fingerprint import digest, of_path
from ...base.version import __version__
from ...models.loading import resolve_model
from .stage import Stage

if TYPE_CHECKING:
    from .schema import Recipe


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
