"""`pruned_structure.json`: which heads and channels stayed, so that a cut can be audited and replayed."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..base.errors import BarberError
from .names import STRUCTURE_NAME
from .record import read_versioned


class KeptUnits(BaseModel):
    """Heads or channels of one decoder layer."""

    of: int = Field(ge=1, description="how many there were")
    kept: list[int] = Field(min_length=1, description="those that stayed, by their position before the cut, ascending")


class LayerStructure(BaseModel):
    """What stayed in one decoder layer."""

    heads: KeptUnits = Field(description="attention heads, or key-value groups, as `head_unit` says")
    channels: KeptUnits = Field(description="FFN channels")


class PrunedStructure(BaseModel):
    """`pruned_structure.json`: what was cut, how it was chosen, from what, with what."""

    model_config = ConfigDict(extra="forbid", title="optimum_barber pruned structure")

    format_version: Literal[1] = Field(1, description="version of this format")
    head_unit: Literal["head", "key-value group", "query head"] = Field(
        description="what a head of the record is: a query head with its own key and value; a key-value head with all "
        "its query heads; or a query head alone, of which every group keeps the same number"
    )
    removed: float = Field(gt=0, lt=1, description="share of the parameters of attention and MLP that went")
    layers: dict[str, LayerStructure] = Field(description="by decoder layer")
    scorer: dict[str, Any] = Field(description="name and arguments")
    settings: dict[str, Any] = Field(description="shares and rounding as asked for")
    calibration: dict[str, Any] | None = Field(description="source, samples, sequence_length, seed, fingerprint")
    base_model: dict[str, Any] = Field(description="name, model_type and dtype of the model that was cut")
    model_type: str = Field(
        description="of the result, which may be another where the family cannot say its head count"
    )
    software: dict[str, str] = Field(description="versions")
    steps: list[dict[str, Any]] = Field(
        default_factory=list, description="what changed the weights after the cut, in order: name and settings"
    )

    @property
    def unit(self) -> str:
        """The head unit by its name in the settings: group or query."""
        return "query" if self.head_unit == "query head" else "group"

    @property
    def kept(self) -> dict[str, dict[str, list[int]]]:
        """Units that stayed, by decoder layer and kind."""
        kept = {}
        for name, layer in self.layers.items():
            kept[name] = {"heads": layer.heads.kept, "channels": layer.channels.kept}
        return kept

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what stayed."""
        return hashlib.sha256(json.dumps(self.kept, sort_keys=True).encode()).hexdigest()


def read_structure(path: str | Path) -> PrunedStructure:
    """The record of a shrunk checkpoint, by its directory or file; raises BarberError if it is missing or newer."""
    path = Path(path) / STRUCTURE_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise BarberError(f"structure {path} does not exist")
    return read_versioned(path, PrunedStructure, "pruned structure")
