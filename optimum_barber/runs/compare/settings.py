"""What is compared and how it is measured. Imports neither torch nor transformers."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...base.errors import BarberError, unknown_name
from ...prune.rebuild_settings import RebuildConfig
from ...prune.settings import BarberConfig

OF_A_CELL = {"producer", "producer_args", "rebuild", "pattern", "sparsity"}  # fields of BarberConfig that cells decide
FIXED = OF_A_CELL | {"effort", "allocation_args", "calibration", "device", "dtype", "ignore"}
CALIBRATION_AXES = ("samples", "sequence_length")
REBUILD_AXES = [name for name in RebuildConfig.model_fields if name != "method"]
AXES = [*REBUILD_AXES, *CALIBRATION_AXES, *(name for name in BarberConfig.model_fields if name not in FIXED)]


class CompareSettings(BaseModel):
    """The axes of a comparison and its evaluation; every combination is a cell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    producers: list[str] = Field(
        ["magnitude", "wanda", "sparsegpt"], min_length=1,
        description="producers, each NAME or NAME,K=V,K=V with arguments; as=LABEL gives its name in tables",
    )  # fmt: skip
    rebuilds: list[str] = Field(
        ["none", "barber"], min_length=1,
        description="rebuilders or chains, each NAME or NAME,K=V,K=V with its settings",
    )  # fmt: skip
    patterns: list[str] = Field(
        ["unstructured"], min_length=1, description="patterns of the masks: unstructured and N:M"
    )
    sparsities: list[float] = Field(
        [], description="shares of weights to prune, for the unstructured pattern; N:M implies its own"
    )
    vary: dict[str, list[Any]] = Field({}, description="further axis: a setting and its values")
    rebuild_args: dict[str, Any] = Field({}, description="settings of all rebuilds")
    evaluation: str = Field(description="text of the perplexity: a file, c4, wikitext2, ptb or pydoc")
    windows: int | None = Field(None, ge=1, description="number of windows spread over that text (default: all)")
    tasks: list[str] = Field([], description="lm-eval tasks, or local ones as choice:FILE.jsonl and rolling:FILE")
    limit: int | None = Field(None, ge=1, description="number of rows per task (default: all)")
    task_batch_size: int = Field(1, ge=1, description="number of rows of a task at once")
    keep_masks: bool = Field(False, description="keep the masks of every cell")

    @field_validator("vary")
    @classmethod
    def _known(cls, vary: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in vary.items():
            if name not in AXES:
                raise unknown_name("setting to vary", name, AXES)
            if not values:
                raise BarberError(f"vary {name} is empty: give the values it takes")
        return vary


ALIAS = "as"


def named(text: str) -> tuple[str, dict[str, str]]:
    """Split NAME,K=V,K=V into the name and its arguments, without the label `as=LABEL`.

    Raises:
        BarberError: of another form.
    """
    name, *pairs = text.split(",")
    arguments = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if not name or len(arguments) < len(pairs):
        raise BarberError(f"{text!r} is not legal: NAME or NAME,K=V,K=V, such as barber,rounds=2")
    arguments.pop(ALIAS, None)
    return name, arguments


def label_of(text: str) -> str:
    """Return what stands for NAME,K=V,as=LABEL in tables: LABEL, or the text where it has none."""
    for pair in text.split(","):
        if pair.startswith(f"{ALIAS}="):
            return pair.removeprefix(f"{ALIAS}=")
    return text
