"""A recipe: model, calibration, ordered stages, output; and its JSON schema for editors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from ...base.calibration import CalibrationConfig
from ...base.fields import DTYPES, one_of
from ...prune.settings import BarberConfig
from .stage import STAGES, Stage

Tracker = Literal["mlflow", "tensorboard", "wandb"]


class Calibration(CalibrationConfig):
    """The calibration set of all stages."""

    texts: list[str] = Field(
        ["c4"], min_length=1, description="text or .jsonl files, c4, wikitext2, ptb or pydoc, which is always there"
    )
    sequence_length: int | None = Field(
        None, ge=2, description="tokens a window; default 2048, or what the model takes"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="decides the windows, random masks and the order of training")

    def windows(self) -> CalibrationConfig:
        """The same without the seed, as the settings of a run take it."""
        return CalibrationConfig(**self.model_dump(exclude={"seed"}))


class Recipe(BaseModel):
    """A chain of stages on one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="optimum_barber recipe")

    version: Literal[1] = Field(1, description="version of the recipe format")
    name: str = Field("recipe", pattern=r"^[\w. -]+$", description="for reports and trackers")
    model: str = Field(description="hub id, directory, GGUF file, or installed:PACKAGE")
    variables: dict[str, Any] = Field(default_factory=dict, description="values for ${name} anywhere below")
    calibration: Calibration = Field(Calibration(), description="the calibration set of all stages")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto", description="of the result: auto keeps the model's own"
    )
    stages: list[SerializeAsAny[Stage]] = Field(min_length=1, description="in order")
    output: str = Field(min_length=1, description="directory of the results")
    track: list[Tracker] = Field(default_factory=list, description="trackers that follow the run")

    def config(self, **settings: Any) -> BarberConfig:
        """The settings of a pruning run on this recipe's calibration set."""
        return BarberConfig(
            calibration=self.calibration.windows(),
            seed=self.calibration.seed,
            device=self.device,
            dtype=self.dtype,
            **settings,
        )


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file: a stage is its kind, alone or with its settings."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    definitions.pop("Stage", None)
    choices: list[dict[str, Any]] = [{"enum": list(STAGES)}]
    for kind, made in STAGES.items():
        own = made.model_json_schema()
        definitions |= own.pop("$defs", {})
        choices.append(
            {
                "type": "object",
                "properties": {kind: {"anyOf": [own, {"type": "null"}]}},
                "required": [kind],
                "additionalProperties": False,
            }
        )
    schema["properties"]["stages"]["items"] = {"anyOf": choices}
    return schema
