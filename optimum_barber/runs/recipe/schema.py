"""A recipe: model, calibration, ordered stages, output; and its JSON schema for editors."""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from .stage import STAGES, SharedSettings, Stage

Tracker = Literal["mlflow", "tensorboard", "wandb"]


class Recipe(SharedSettings):
    """A chain of stages on one model."""

    stages: list[SerializeAsAny[Stage]] = Field(min_length=1, description="in order")
    output: str = Field(min_length=1, description="directory of the results")
    track: list[Tracker] = Field(default_factory=list, description="trackers that follow the run")

    def flat_settings(self) -> dict[str, Any]:
        """Return the settings as one level of plain values."""
        settings: dict[str, Any] = {"model": self.model}
        for key, value in self.calibration.model_dump().items():
            settings[f"calibration/{key}"] = value if isinstance(value, int | float | str) else str(value)
        for number, stage in enumerate(self.stages, 1):
            for key, value in stage.model_dump().items():
                settings[f"{number:02d}-{stage.kind}/{key}"] = value if isinstance(value, int | float) else str(value)
        return settings


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file: a stage is its kind, alone or with its settings."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    definitions.pop("Stage", None)
    choices: list[dict[str, Any]] = [{"enum": list(STAGES)}]
    for kind, made in STAGES.items():
        own = made.model_json_schema()
        definitions |= own.pop("$defs", {})
        choices.append({
            "type": "object", "properties": {kind: {"anyOf": [own, {"type": "null"}]}}, "required": [kind],
            "additionalProperties": False,
        })  # fmt: skip
    schema["properties"]["stages"]["items"] = {"anyOf": choices}
    return schema
