"""What a sweep is told. Imports neither torch nor transformers."""

from itertools import product
from typing import Annotated

from pydantic import ConfigDict, Field, field_validator

from ...base.calibration import Calibrated, CalibrationConfig, at_least
from ...base.errors import BarberError
from ...base.fields import DTYPES, one_of
from ...shrink.settings import HEAD_UNITS, Share, ShrinkConfig


class SweepConfig(Calibrated):
    """Every scorer at every ratio with every number of calibration windows, on one model and one evaluation text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scorers: list[str] = Field(["bip"], min_length=1, description="scorers of heads and channels")
    remove: list[Share] = Field(
        min_length=1, description="shares of the parameters of attention and MLP to remove, each in (0, 1)"
    )
    samples: list[Annotated[int, Field(ge=1)]] = Field(
        [128], min_length=1, description="numbers of calibration windows to compare"
    )
    calibration: Annotated[CalibrationConfig, at_least("sequence_length", 2)] = Field(
        CalibrationConfig(), description="the calibration windows, but for their number"
    )
    evaluation: str = Field(description="text of the perplexity: a file, c4, wikitext2, ptb or pydoc")
    windows: int | None = Field(None, ge=1, description="number of windows spread over that text (default: all)")
    head_unit: Annotated[str, one_of("head unit", HEAD_UNITS)] = Field(
        "group",
        description="unit of grouped-query attention: group (a KV head with its query heads) or query",
    )
    round_to: int = Field(1, ge=1, description="round the kept FFN channels to a multiple of this, such as 64")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the windows and of random scores")
    device: str = Field(
        "auto",
        description="device to use: auto, cpu, cuda, cuda:1, ...; on the command line several too, such as "
        "cuda:0,cuda:1 or all, which share the cells",
    )
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto", description="dtype of the weights, or auto for the model's own; a CPU always computes in float32"
    )
    latency: bool = Field(True, description="measure prefill and decode, once for every shape")

    @field_validator("calibration")
    @classmethod
    def _without_samples(cls, calibration: CalibrationConfig) -> CalibrationConfig:
        if "samples" in calibration.model_fields_set:
            raise BarberError("calibration.samples is an axis of a sweep: SweepConfig(samples=[16, 128])")
        return calibration

    def cells(self) -> list[ShrinkConfig]:
        """The settings of every cell, by sample count, then scorer, then ratio."""
        axes = (dict.fromkeys(axis) for axis in (self.samples, self.scorers, self.remove))
        own = set(ShrinkConfig.model_fields) & set(type(self).model_fields) - {"remove", "calibration"}
        shared = {name: getattr(self, name) for name in own}
        cells = []
        for samples, scorer, remove in product(*axes):
            calibration = self.calibration.model_copy(update={"samples": samples})
            cells.append(ShrinkConfig(scorer=scorer, remove=remove, calibration=calibration, **shared))
        return cells
