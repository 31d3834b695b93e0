"""What a run of `refine` is told. Imports neither torch nor transformers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ...base.calibration import Calibrated, CalibrationConfig, at_least
from ...base.fields import PRECISIONS, one_of


class RefineSettings(BaseModel):
    """How masks are refined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(
        40, ge=1, description="largest number of steps, each of a gradient and exchanges; they end early if none helps"
    )
    batch_size: int = Field(4, ge=1, description="windows that the gradient of a step is learned from")
    exchanges: int = Field(1, ge=1, description="largest number of exchanges per row and step")
    shrinkage: float = Field(
        0.3, ge=0, lt=1,
        description="share by which Gram matrices shrink towards their diagonal, and gradients towards the gain of "
        "each weight on its own",
    )  # fmt: skip
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")


class RefineConfig(Calibrated, RefineSettings):
    """Everything that decides the refined masks, but the models themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Annotated[CalibrationConfig, at_least("samples", 2)] = Field(
        CalibrationConfig(),
        description="the calibration windows; every eighth measures, the others are learned from",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the windows")
    device: str = Field(
        "auto",
        description="device to use: auto, cpu, cuda, cuda:1, ...; on the command line several too, such as "
        "cuda:0,cuda:1, or all: a process on each, which share the windows",
    )
    precision: Annotated[str, one_of("precision", PRECISIONS)] = Field(
        "auto",
        description="precision of float32 matrix products: highest (float32), high (TF32), medium (bfloat16), or auto: "
        "what the device has units for",
    )
