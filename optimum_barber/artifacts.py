"""What a run leaves: mask file, sparsity config, and the directory that holds them, never half-written."""

import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import BarberError
from .masks import PackedMask

MASKS_NAME = "sparsity_masks.safetensors"
SPARSITY_NAME = "sparsity_config.json"
REPORT_NAME = "report.json"
MASKS_FORMAT = "optimum_barber.masks"
FORMAT_VERSION = 1
PARTIAL_MARK = ".optimum_barber_partial"


class ModuleSparsity(BaseModel):
    """One pruned Linear."""

    shape: tuple[int, int] = Field(description="(out, in)")
    pruned: int = Field(ge=0, description="weights that are exactly zero by the mask")
    sparsity: float = Field(ge=0, le=1, description="pruned share of the weights")
    sha256: str = Field(description="hash of the packed keep mask and its shape")


class SparsityConfig(BaseModel):
    """`sparsity_config.json`: what was pruned, how, from what, with what."""

    model_config = ConfigDict(extra="forbid", title="optimum_barber sparsity config")

    format_version: Literal[1] = Field(1, description="version of this format")
    masks: str = Field(MASKS_NAME, description="the mask file, beside this one")
    pattern: str = Field(description="'unstructured' or N:M along the input dimension")
    target_sparsity: float = Field(gt=0, lt=1, description="what was asked for")
    sparsity: float = Field(gt=0, lt=1, description="what was reached over all target modules")
    modules: dict[str, ModuleSparsity] = Field(description="the target modules by name")
    targets: list[str] = Field(["Linear"], description="classes of the target modules")
    ignored: list[str] = Field(description="modules of these classes that were left dense")
    producer: dict[str, Any] = Field(description="name and arguments")
    rebuild: dict[str, Any] | None = Field(description="settings of the rebuild; null where the first masks were kept")
    calibration: dict[str, Any] = Field(description="source, samples, sequence_length, seed, fingerprint")
    base_model: dict[str, Any] = Field(description="name, model_type and dtype of the dense model")
    software: dict[str, str] = Field(description="versions")


def write_masks(path: Path, masks: Mapping[str, PackedMask], pattern: str) -> None:
    """Write a mask file: a safetensors file with one uint8 tensor a Linear, shapes and hashes in its metadata."""
    from safetensors.torch import save_file

    metadata = {
        "format": MASKS_FORMAT,
        "version": str(FORMAT_VERSION),
        "pattern": pattern,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
        "sha256": json.dumps({name: mask.sha256 for name, mask in masks.items()}),
    }
    save_file({name: mask.bits for name, mask in masks.items()}, str(path), metadata)


class MaskFile(Mapping[str, PackedMask]):
    """A mask file opened for reading, one mask at a time.

    Raises:
        BarberError: it is missing, no mask file, or of a newer version; on access, a broken hash.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise BarberError(f"mask file {path} does not exist")
        try:
            self._file = safe_open(self.path, "pt")
        except SafetensorError as error:
            raise BarberError(f"mask file {path} is no safetensors file: {error}") from None
        metadata = self._file.metadata() or {}
        self._keys = set(self._file.keys())
        if metadata.get("format") != MASKS_FORMAT:
            raise BarberError(f"mask file {path} is of format {metadata.get('format')!r}, not {MASKS_FORMAT!r}")
        if metadata.get("version") != str(FORMAT_VERSION):
            raise BarberError(f"mask file {path} has version {metadata.get('version')}; known is {FORMAT_VERSION}")
        try:
            self.pattern = metadata["pattern"]
            self._shapes = json.loads(metadata["shapes"])
            self._hashes = json.loads(metadata["sha256"])
        except (KeyError, json.JSONDecodeError) as error:
            raise BarberError(f"mask file {path} has broken metadata: {error}") from None

    def __getitem__(self, name: str) -> PackedMask:
        if name not in self._shapes or name not in self._keys:
            raise BarberError(f"mask file {self.path} has no module {name}")
        mask = PackedMask(self._file.get_tensor(name), tuple(self._shapes[name]))
        if mask.bits.numel() != -(-mask.weights // 8) or mask.sha256 != self._hashes.get(name):
            raise BarberError(f"mask file {self.path}: the hash of {name} does not match its mask")
        return mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with a trailing newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_output(directory: str | Path, overwrite: bool, inputs: list[Path]) -> Path:
    """The output directory, if it may be written.

    Raises:
        BarberError: it is an input or within one, is not empty (without `overwrite`), or cannot be written.
    """
    output = Path(directory).expanduser().resolve()
    for path in inputs:
        held = path.expanduser().resolve()
        if output == held or held in output.parents:
            raise BarberError(f"output {directory} is the input {path}, or lies within it")
        if output in held.parents:
            raise BarberError(f"output {directory} holds the input {path}")
    if os.path.ismount(output):
        raise BarberError(f"output {directory} is a mount point, which cannot be replaced: give a folder within it")
    if output.exists() and not output.is_dir():
        raise BarberError(f"output {directory} is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise BarberError(f"output {directory} is not empty: give another, or --overwrite")
    parent = next(p for p in output.parents if p.exists())
    if not parent.is_dir() or not os.access(output if output.is_dir() else parent, os.W_OK):
        raise BarberError(f"output {directory} cannot be written: no permission in {parent}")
    return output


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A sibling `DIR.partial` that takes the place of `output` when the block ends well, else vanishes.

    What `output` held before stays untouched until then, also through a kill.
    """
    partial = output.with_name(output.name + ".partial")
    if partial.exists() and not (partial / PARTIAL_MARK).exists():
        raise BarberError(f"output {output}: {partial} is in the way and not ours; move it")
    shutil.rmtree(partial, ignore_errors=True)
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        (partial / PARTIAL_MARK).touch()
    except OSError as error:
        raise BarberError(f"output {output} cannot be written: {error.strerror}") from None
    try:
        yield partial
    except BaseException:
        for path in (partial, *made):
            shutil.rmtree(path, ignore_errors=True)
        raise
    try:
        _swap_in(partial, output)
    except OSError as error:
        raise BarberError(f"output {output} cannot be put in place ({error.strerror}); all is in {partial}") from None
    shutil.rmtree(partial, ignore_errors=True)


def _swap_in(partial: Path, output: Path) -> None:
    """Put `partial` in the place of `output`; what was there ends up in `partial`, to be removed."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    mark = partial / PARTIAL_MARK
    if not output.exists():
        mark.unlink()
        partial.rename(output)
    elif _exchange(partial, output):
        mark.touch()  # `partial` is now what was there before, and may go
        (output / PARTIAL_MARK).unlink()
    else:
        old = output.with_name(output.name + ".old")
        mark.unlink()
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one atomic step, where the system can."""
    at_cwd, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
