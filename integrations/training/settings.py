"""The settings of a training under the masks. Imports neither torch nor transformers."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from optimum_barber.base.calibration import Calibrated, CalibrationConfig, at_least
from optimum_barber.base.errors import BarberError
from optimum_barber.base.fields import PRECISIONS, one_of

LOSSES = ("lm", "distill")


class TrainingSettings(BaseModel):
    """What every training is told; with the same settings, windows and model, the same bits on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Annotated[str, one_of("loss", LOSSES)] = Field(
        "lm",
        description="lm (cross-entropy of the text's next token) or distill (divergence from the dense model's next "
        "token)",
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="of both distributions under loss distill")
    lm_weight: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="weight of the loss lm that is added to loss distill"
    )
    steps: int = Field(200, ge=1, description="optimizer steps")
    learning_rate: float = Field(2e-4, gt=0, description="the highest, after the warmup")
    batch_size: int = Field(8, ge=1, description="windows on the device at once")
    gradient_accumulation: int = Field(1, ge=1, description="batches an optimizer step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    scheduler: Literal["linear", "cosine", "constant"] = Field("cosine", description="of the learning rate")
    weight_decay: float = Field(0.0, ge=0, description="of the trained weights")
    seed: int = Field(0, ge=0, lt=2**32, description="decides all that is random: order of windows, dropout, starts")
    device: str = Field("auto", description="device to use: auto, cpu, cuda, cuda:1, ...")
    precision: Annotated[str, one_of("precision", PRECISIONS)] = Field(
        "auto",
        description="of float32 matrix products: highest (float32), high (TF32), medium (bfloat16), or auto: what the "
        "device has units for",
    )
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")
    logging_steps: int = Field(10, ge=1, description="steps between two points of the loss curve")
    saving_steps: int = Field(100, ge=1, description="steps between two checkpoints to resume from")

    @model_validator(mode="after")
    def _check_loss(self) -> "TrainingSettings":
        of_distillation = {"temperature": self.temperature != 1, "lm_weight": self.lm_weight != 0}
        for name, is_set in of_distillation.items():
            if is_set and self.loss != "distill":
                raise BarberError(f"{name} {getattr(self, name):g} goes with loss distill, not with {self.loss}")
        return self


class RecoverSettings(TrainingSettings):
    """How the kept weights of a pruned or shrunk model are trained."""

    loss: Annotated[str, one_of("loss", LOSSES)] = Field(
        "distill",
        description="distill (divergence from the dense model's next token) or lm (cross-entropy of the text's)",
    )
    steps: int = Field(400, ge=1, description="largest number of optimizer steps")
    learning_rate: float = Field(1e-4, gt=0, description="the highest, after the warmup")
    batch_size: int = Field(2, ge=1, description="windows on the device at once")
    gradient_accumulation: int = Field(1, ge=1, description="batches an optimizer step")
    parameters: list[str] = Field(
        [], description="parameters to train, by glob of their full name in memory; default: all of the model"
    )
    saving_steps: int = Field(
        50, ge=1, description="steps between two looks at the held-out windows, each with a checkpoint to resume from"
    )
    patience: int = Field(
        3, ge=1, description="looks at the held-out windows without a gain after which the training ends"
    )
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the text's end that is only measured")


class RecoverConfig(Calibrated, RecoverSettings):
    """Everything that decides a recovery but the models themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Annotated[CalibrationConfig, at_least("sequence_length", 2)] = Field(
        CalibrationConfig(),
        description="the text to train on; `samples` does not count: steps and batches say how many windows there are",
    )
