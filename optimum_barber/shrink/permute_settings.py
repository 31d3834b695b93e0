"""The settings of `permute`. Imports neither torch nor transformers."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..base.calibration import Calibrated, CalibrationConfig, at_least
from ..base.errors import BarberError
from ..base.fields import DTYPES, one_of
from ..tensors.patterns import SparsityPattern

KINDS = ("channels", "values", "stream")


def _semi_structured(value: str) -> str:
    if value == "unstructured":
        raise BarberError(f"pattern {value!r} has no groups: give N:M with 0 < N < M, such as 2:4")
    return str(SparsityPattern.parse(value, None))


class PermuteSettings(BaseModel):
    """What changes places, and for which pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Annotated[str, AfterValidator(_semi_structured)] = Field(
        "2:4", description="N:M that the masks will have: the order decides which weights share a group of M"
    )
    kinds: list[Annotated[str, one_of("kind", KINDS)]] = Field(
        list(KINDS),
        min_length=1,
        description="what changes places: channels (of the FFN), values (of attention), stream (the residual stream)",
    )


class PermuteConfig(Calibrated, PermuteSettings):
    """Everything that decides the order of channels, but the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Annotated[CalibrationConfig, at_least("sequence_length", 2)] = Field(
        CalibrationConfig(), description="the calibration windows"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the windows")
    device: str = Field("auto", description="device to use: auto, cpu, cuda, cuda:1, ...")
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto", description="dtype of the result: float32, float16, bfloat16, or auto (the model's own; GGUF: float16)"
    )
    batch_size: int | None = Field(
        None, ge=1, description="number of windows on the device at once (default: all); never changes the result"
    )
