"""The settings of a LoRA training. Imports neither torch nor transformers nor peft."""

from typing import Literal

from pydantic import Field, field_validator

from optimum_barber.base.errors import BarberError
from optimum_barber.integrations.training.settings import TrainingSettings


class LoraSettings(TrainingSettings):
    """How an adapter is trained; with the same settings, windows and model, the same adapter bit for bit on a CPU."""

    rank: int = Field(16, ge=1, description="r, the inner dimension of B A")
    alpha: float = Field(32.0, gt=0, description="the change is scaled by alpha / rank, for rsLoRA alpha / sqrt(rank)")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input")
    targets: list[str] = Field(
        [],
        description="Linears to train, by glob of their full name; default: all pruned ones, of a dense model all "
        "in its decoder layers",
    )
    use_rslora: bool = Field(False, description="rank-stabilised scale, alpha / sqrt(rank)")
    use_dora: Literal[False] = Field(False, description="not supported: DoRA rescales whole rows")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights: auto is float32 on a CPU, bfloat16 on a GPU; A and B are float32"
    )

    @field_validator("use_dora", mode="before")
    @classmethod
    def _no_dora(cls, value: object) -> object:
        if value:
            raise BarberError("use_dora is not supported: DoRA rescales whole rows; use_rslora is")
        return value
