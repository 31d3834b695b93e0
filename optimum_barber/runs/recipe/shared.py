"""What all stages of a recipe share: model, calibration set, device and dtype."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...base.calibration import CalibrationConfig
from ...base.fields import DTYPES, one_of
from ...prune.settings import BarberConfig


class Calibration(CalibrationConfig):
    """The calibration set of all stages."""

    texts: list[str] = Field(
        ["c4"], min_length=1, description="text or .jsonl files, c4, wikitext2, ptb or pydoc, which is always there"
    )
    sequence_length: int | None = Field(
        None, ge=2, description="tokens a window; default 2048, or what the model takes"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="decides the windows, random masks and the order of training")


class SharedSettings(BaseModel):
    """The settings of a recipe that hold for all its stages."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="optimum_barber recipe")

    version: Literal[1] = Field(1, description="version of the recipe format")
    name: str = Field("recipe", pattern=r"^[\w. -]+$", description="for reports and trackers")
    model: str = Field(description="hub id, directory, GGUF file, or installed:PACKAGE")
    variables: dict[str, Any] = Field(default_factory=dict, description="values for ${name} anywhere below")
    calibration: Calibration = Field(Calibration(), description="the calibration set of all stages")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto", description="of the result: auto keeps the model's own"
    )

    def run_settings(self) -> dict[str, Any]:
        """Return calibration, seed and device under the names that the settings of every run give them."""
        calibration = CalibrationConfig(**self.calibration.model_dump(exclude={"seed"}))
        return {"calibration": calibration, "seed": self.calibration.seed, "device": self.device}

    def barber_config(self, **settings: Any) -> BarberConfig:
        """Return the settings of a pruning run on this calibration set."""
        return BarberConfig(**self.run_settings(), dtype=self.dtype, **settings)
