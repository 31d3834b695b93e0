"""What a run of `refine` is told. Imports neither torch nor transformers."""

from pydantic import BaseModel, ConfigDict, Field


class RefineSettings(BaseModel):
    """How masks are refined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(2, ge=1, description="of gradient, exchange and measurement at most; they end where none helps")
    exchanges: int = Field(1, ge=1, description="most exchanges a row and round")
    shrinkage: float = Field(
        0.3, ge=0, lt=1,
        description="of the Gram matrices to their diagonal, and of gradients to each weight's own gain by being kept: "
        "calibration tokens are few",
    )  # fmt: skip


class RefineConfig(RefineSettings):
    """Everything that decides the refined masks, but the models themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: list[str] = Field(default_factory=list, description="texts to calibrate on")
    text_field: str = Field("text", description="the field of a .jsonl file that holds the text")
    samples: int = Field(
        128, ge=2, description="how many calibration windows; every fourth measures, the others are learned from"
    )
    sequence_length: int | None = Field(
        None, ge=1, description="tokens a window; default 2048, or what the model supports if that is less"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="decides the windows")
    device: str = Field("auto", description="where the model is worked on: auto, cpu, cuda, cuda:1, ...")
