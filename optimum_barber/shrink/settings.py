"""The settings of `shrink`. Imports neither torch nor transformers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..base.calibration import Calibrated, CalibrationConfig, at_least
from ..base.errors import BarberError
from ..base.fields import DTYPES, one_of

HEAD_UNITS = ("group", "query")
SHARES = ("remove", "remove_heads", "remove_channels")


def _share(name: str, least_open: bool) -> BeforeValidator:
    """A validator of a share in (0, 1), or [0, 1)."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < 1 or (least_open and number == 0):
            raise BarberError(f"{name} {value} is not legal: a share in {'(0, 1)' if least_open else '[0, 1)'}")
        return number

    return BeforeValidator(check)


Share = Annotated[float, _share("remove", True)]


class ShrinkSettings(BaseModel):
    """The shares to remove, and the scorer that ranks units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scorer: str = Field("bip", description="method that ranks heads and channels, or experts: bip, reap, ...")
    scorer_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the scorer")
    remove: Share | None = Field(
        None,
        description="share of the parameters of attention and MLP to remove, in (0, 1); heads are rounded to whole "
        "units, FFN channels make up the total",
    )
    remove_heads: Annotated[float | None, _share("remove heads", False)] = Field(
        None, description="share of the heads to remove, in [0, 1); with --remove, the channels make up the rest"
    )
    remove_channels: Annotated[float | None, _share("remove channels", False)] = Field(
        None, description="share of the FFN channels to remove, in [0, 1), instead of --remove"
    )
    remove_experts: Annotated[float | None, _share("remove experts", True)] = Field(
        None, description="share of the experts of every sparse MLP to remove, in (0, 1), instead of heads and channels"
    )
    head_unit: Annotated[str, one_of("head unit", HEAD_UNITS)] = Field(
        "group",
        description="unit of grouped-query attention to remove: group (a KV head with all its query heads) or query "
        "(the same number of query heads in every group)",
    )
    round_to: int = Field(1, ge=1, description="round the kept FFN channels to a multiple of this, such as 64")
    compensate: bool = Field(
        False,
        description="replace the mean contribution of the removed units by biases, where the model's configuration "
        "has biases",
    )
    structure: str | None = Field(
        None, description="pruned_structure.json, or its directory, of an earlier cut to repeat"
    )

    @model_validator(mode="after")
    def _check_experts(self) -> "ShrinkSettings":
        others = [name for name in (*SHARES, "structure") if getattr(self, name) is not None]
        if self.remove_experts is not None and (others or self.compensate):
            raise BarberError("remove experts stands alone: heads, channels and biases are another run")
        if self.remove_experts is not None and self.scorer_args:
            raise BarberError(f"scorer args {self.scorer_args} are not legal: scorers of experts take none")
        return self

    @model_validator(mode="after")
    def _check(self) -> "ShrinkSettings":
        shares = [name for name in SHARES if getattr(self, name) is not None]
        if self.structure is not None and shares:
            raise BarberError("structure and shares to remove exclude each other: the record says what stays")
        if not shares and self.structure is None and self.remove_experts is None:
            raise BarberError(
                "remove is missing: a share in (0, 1), or --remove-heads and --remove-channels, or --remove-experts"
            )
        if "remove" in shares and "remove_channels" in shares:
            raise BarberError(
                "remove and remove channels exclude each other: under --remove, channels make up the total"
            )
        return self


class WholeModelRun(Calibrated):
    """The settings of every run on a whole model in memory that looks at calibration windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Annotated[CalibrationConfig, at_least("sequence_length", 2)] = Field(
        CalibrationConfig(), description="the calibration windows"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the windows and of random scores")
    device: str = Field("auto", description="device to use: auto, cpu, cuda, cuda:1, ...")
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto",
        description="dtype of the result: float32, float16, bfloat16, or auto (the model's own; GGUF: float16)",
    )
    batch_size: int | None = Field(
        None, ge=1, description="number of windows on the device at once (default: all); never changes the result"
    )


class ShrinkConfig(WholeModelRun, ShrinkSettings):
    """Everything that decides which heads and channels stay, but the model itself."""
