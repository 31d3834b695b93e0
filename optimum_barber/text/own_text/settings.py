"""The settings of a model that writes its own calibration text. Imports neither torch nor transformers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ...base.fields import DTYPES, one_of


class OwnTextConfig(BaseModel):
    """Everything but the model that decides the text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(65536, ge=1, description="number of tokens to generate, rounded up to whole sequences")
    length: int | None = Field(
        None, ge=1,
        description="tokens per sequence, which may span documents (default: 512, or the model's maximum if that is "
        "less)",
    )  # fmt: skip
    start: str | None = Field(
        None, min_length=1,
        description="prompt of every sequence (default: the tokenizer's token for the beginning of a text, or else for "
        "its end)",
    )  # fmt: skip
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(
        0.9, gt=0, le=1, description="nucleus sampling: draw from the most likely tokens up to this total probability"
    )
    batch: int = Field(16, ge=1, description="largest number of sequences to generate at a time")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the text")
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto", description="dtype of the computation: auto (float32 on a CPU), float32, float16, bfloat16"
    )
    device: str = Field("auto", description="device to use: auto, cpu, cuda, cuda:1, ...")
