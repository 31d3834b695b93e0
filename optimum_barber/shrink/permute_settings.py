"""The settings of `permute`. Imports neither torch nor transformers."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..base.errors import BarberError
from ..base.fields import one_of
from ..tensors.patterns import SparsityPattern
from .settings import WholeModelRun

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
        ["channels", "values"],
        min_length=1,
        description="what changes places: channels (of the FFN), values (of attention), stream (the residual stream)",
    )


class PermuteConfig(WholeModelRun, PermuteSettings):
    """Everything that decides the order of channels, but the model itself."""
