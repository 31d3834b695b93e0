"""The settings of a LoRA training. Imports neither torch nor transformers nor peft."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from optimum_barber.base.errors import BarberError


class LoraSettings(BaseModel):
    """How an adapter is trained; with the same settings, windows and model, the same adapter bit for bit on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    steps: int = Field(200, ge=1, description="optimizer steps")
    learning_rate: float = Field(2e-4, gt=0, description="the highest, after the warmup")
    batch_size: int = Field(8, ge=1, description="windows on the device at once")
    gradient_accumulation: int = Field(1, ge=1, description="batches an optimizer step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    scheduler: Literal["linear", "cosine", "constant"] = Field("cosine", description="of the learning rate")
    weight_decay: float = Field(0.0, ge=0, description="of A and B")
    seed: int = Field(0, ge=0, lt=2**32, description="decides the start of A, the order of the windows and dropout")
    device: Literal["auto", "cpu", "cuda", "xpu"] = Field("auto", description="auto is a GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights: auto is float32 on a CPU, bfloat16 on a GPU; A and B are float32"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")
    logging_steps: int = Field(10, ge=1, description="steps between two points of the loss curve")
    saving_steps: int = Field(100, ge=1, description="steps between two checkpoints to resume from")

    @field_validator("use_dora", mode="before")
    @classmethod
    def _no_dora(cls, value: object) -> object:
        if value:
            raise BarberError("use_dora is not supported: DoRA rescales whole rows; use_rslora is")
        return value
