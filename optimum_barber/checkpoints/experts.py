"""`pruned_experts.json`: which experts of every sparse MLP stayed."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..base.errors import BarberError
from .names import EXPERTS_NAME
from .record import read_versioned
from .structure import KeptUnits


class ScoredExperts(KeptUnits):
    """The experts of one sparse MLP."""

    scores: list[float] = Field(description="of all experts before the cut; the highest stayed")


class PrunedExperts(BaseModel):
    """`pruned_experts.json`: what was removed, how it was chosen, from what, with what."""

    model_config = ConfigDict(extra="forbid", title="optimum_barber pruned experts")

    format_version: Literal[1] = Field(1, description="version of this format")
    layers: dict[str, ScoredExperts] = Field(description="by the name of the experts' module")
    scorer: str = Field(description="name of the scorer")
    calibration: dict[str, Any] | None = Field(description="source, samples, sequence_length, seed, fingerprint")
    base_model: dict[str, Any] = Field(description="name, model_type and dtype of the model that was cut")
    software: dict[str, str] = Field(description="versions")
    steps: list[dict[str, Any]] = Field(
        default_factory=list, description="what changed the weights after the cut, in order: name and settings"
    )

    @property
    def counts(self) -> dict[str, int]:
        """Experts of every sparse MLP before and after."""
        layer = next(iter(self.layers.values()))
        return {"before": layer.of, "after": len(layer.kept)}

    @property
    def kept(self) -> dict[str, list[int]]:
        """Experts that stayed, by the name of their module."""
        return {name: layer.kept for name, layer in self.layers.items()}


def read_experts(directory: str | Path) -> PrunedExperts:
    """The record of a checkpoint that lost experts; raises BarberError if it is missing or newer."""
    path = Path(directory) / EXPERTS_NAME
    if not path.is_file():
        raise BarberError(f"{directory} has no {EXPERTS_NAME}")
    return read_versioned(path, PrunedExperts, "record of pruned experts")
