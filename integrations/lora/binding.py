"""`sparsity_adapter.json`: what binds an adapter to the masks that it was trained under."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json_object, write_json
from optimum_barber.checkpoints.names import ADAPTER_MASKS_NAME
from optimum_barber.checkpoints.record import fingerprint_of
from optimum_barber.checkpoints.write import software
from optimum_barber.tensors.masks import PackedMask

FORMAT_VERSION = 1


def mask_fingerprint(masks: Mapping[str, PackedMask]) -> str:
    """Return what `SparsityConfig.fingerprint` is, from the masks themselves."""
    return fingerprint_of({name: mask.sha256 for name, mask in masks.items()})


class AdapterBinding(BaseModel):
    """The content of `sparsity_adapter.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = Field(1, description="version of this format")
    base_model: str | None = Field(description="path or hub id of the pruned model; null where it was in memory")
    mask_fingerprint: str = Field(description="SHA-256 over the names and hashes of all masks of the model")
    software: dict[str, str] = Field(description="versions")

    @classmethod
    def to_masks(cls, fingerprint: str, base_model: str | None) -> "AdapterBinding":
        """Bind an adapter that was trained just now."""
        versions = {**software(), "peft": importlib.metadata.version("peft")}
        return cls(base_model=base_model, mask_fingerprint=fingerprint, software=versions)

    def write(self, directory: Path) -> None:
        """Write it into an adapter's directory."""
        write_json(directory / ADAPTER_MASKS_NAME, self.model_dump())

    @classmethod
    def read(cls, directory: Path) -> "AdapterBinding":
        """Read the binding of the adapter in `directory`.

        Raises:
            BarberError: it is missing, of a newer format, or no binding at all.
        """
        path = directory / ADAPTER_MASKS_NAME
        if not path.is_file():
            raise BarberError(f"adapter {directory} has no {ADAPTER_MASKS_NAME}: it is incomplete")
        content = read_json_object(path, "adapter binding")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise BarberError(f"{path} has format version {version}; known is {FORMAT_VERSION}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise BarberError(f"{path} is no adapter binding: {str(error).splitlines()[0]}") from None
