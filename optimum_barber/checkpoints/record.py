"""What a run leaves beside the checkpoint: mask file and sparsity config."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ..base.errors import BarberError, shown
from ..base.fields import one_line
from ..base.files import beside, parse_json, read_json_object
from ..tensors.masks import PackedMask
from ..tensors.patterns import SparsityPattern
from .names import MASKS_NAME, SPARSITY_NAME
from .shards import Entry, read_header, write_tensors

MASKS_FORMAT = "optimum_barber.masks"
FORMAT_VERSION = 1
Record = TypeVar("Record", bound=BaseModel)
Shape = tuple[NonNegativeInt, NonNegativeInt]


class ModuleSparsity(BaseModel):
    """One pruned Linear."""

    shape: tuple[int, int] = Field(description="(out, in)")
    pruned: int = Field(ge=0, description="weights that are exactly zero by the mask")
    sparsity: float = Field(ge=0, le=1, description="pruned share of the weights")
    sha256: str = Field(description="hash of the packed keep mask and its shape")
    transposed: bool = Field(False, description="whether the checkpoint's files hold the weight as (in, out)")

    @model_serializer(mode="wrap")
    def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        if not self.transposed:
            del content["transposed"]
        return content


def fingerprint_of(hashes: Mapping[str, str]) -> str:
    """SHA-256 over names and hashes of a set of masks, in the order of the names."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def mask_fingerprint(masks: Mapping[str, PackedMask]) -> str:
    """Return what `SparsityConfig.fingerprint` is, from the masks themselves."""
    return fingerprint_of({name: mask.sha256 for name, mask in masks.items()})


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
    reconstruct: dict[str, Any] | None = Field(
        None, description="settings of the reconstruction; null where weights stay"
    )
    allocation: dict[str, Any] | None = Field(
        None,
        description="name and arguments, sparsity of each block, weights that each module had pruned before the "
        "rebuild; null where all have the target",
    )
    calibration: dict[str, Any] = Field(description="source, samples, sequence_length, seed, fingerprint")
    base_model: dict[str, Any] = Field(description="name, model_type and dtype of the dense model")
    software: dict[str, str] = Field(description="versions")
    steps: list[dict[str, Any]] = Field([], description="what was done since: to the weights, or to the masks (refine)")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of all masks: what an adapter or a later step was made for."""
        return fingerprint_of({name: module.sha256 for name, module in self.modules.items()})

    def sparsity_pattern(self) -> SparsityPattern:
        """The pattern of all masks."""
        if self.pattern == "unstructured":
            return SparsityPattern(self.target_sparsity)
        return SparsityPattern.parse(self.pattern, None)


def read_record(directory: str | Path) -> SparsityConfig:
    """The record of a pruned checkpoint, whose mask file lies beside it.

    Raises:
        BarberError: it is missing, of a newer format, no record, or names a file elsewhere.
    """
    path = Path(directory) / SPARSITY_NAME
    if not path.is_file():
        raise BarberError(f"{directory} is no pruned checkpoint: it has no {SPARSITY_NAME}")
    record = read_versioned(path, SparsityConfig, "sparsity config")
    beside(path, record.masks)
    record.sparsity_pattern()
    return record


def read_versioned(path: Path, record: type[Record], kind: str) -> Record:
    """Read a JSON record that has a format version; raises BarberError if that is newer, or it is no such record."""
    content = read_json_object(path, kind)
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise BarberError(f"{path} has format version {shown(version)}; known is {FORMAT_VERSION}")
    try:
        return record.model_validate(content)
    except ValidationError as error:
        raise BarberError(f"{path} is no {kind}: {one_line(error)}") from None


def write_masks(path: Path, masks: Mapping[str, PackedMask], pattern: str) -> None:
    """Write a mask file, durably: a safetensors file with one uint8 tensor a Linear.

    Pattern, shapes and hashes are JSON under a single key of its metadata: safetensors keeps several keys in no
    order, and equal masks shall be equal files.
    """
    content = {
        "version": FORMAT_VERSION,
        "pattern": pattern,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "sha256": {name: mask.sha256 for name, mask in masks.items()},
    }
    bits = {name: mask.bits for name, mask in masks.items()}
    write_tensors(path, bits, {MASKS_FORMAT: json.dumps(content)})


class _MaskMetadata(BaseModel):
    """What `write_masks` puts into the metadata of a mask file."""

    version: Literal[1]
    pattern: str
    shapes: dict[str, Shape]
    sha256: dict[str, str]


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
            header = read_header(self.path)
            self._file = safe_open(self.path, "pt")
        except (BarberError, SafetensorError, OSError) as error:
            raise BarberError(f"mask file {path} is no safetensors file: {error}") from None
        self._entries = header.entries
        if MASKS_FORMAT not in header.metadata:
            raise BarberError(f"mask file {path} is not of the format {MASKS_FORMAT!r}")
        content = parse_json(header.metadata[MASKS_FORMAT], f"mask file {path}", "mask file: its metadata is broken")
        if isinstance(content, dict) and content.get("version", FORMAT_VERSION) != FORMAT_VERSION:
            raise BarberError(f"mask file {path} has version {shown(content['version'])}; known is {FORMAT_VERSION}")
        try:
            metadata = _MaskMetadata.model_validate(content)
        except ValidationError as error:
            raise BarberError(f"mask file {path} has broken metadata: {one_line(error)}") from None
        self.pattern, self._shapes, self._hashes = metadata.pattern, metadata.shapes, metadata.sha256

    def __getitem__(self, name: str) -> PackedMask:
        if name not in self._shapes or name not in self._entries:
            raise BarberError(f"mask file {self.path} has no module {name}")
        shape, packed = self._shapes[name], self._entries[name]
        if packed != Entry(torch.uint8, (-(-math.prod(shape) // 8),)):
            raise BarberError(f"mask file {self.path}: {name} has {packed.shape} bytes for a mask of shape {shape}")
        mask = PackedMask(self._file.get_tensor(name), shape)
        if mask.sha256 != self._hashes.get(name):
            raise BarberError(f"mask file {self.path}: the hash of {name} does not match its mask")
        return mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
