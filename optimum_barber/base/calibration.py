"""The settings of calibration windows. Imports neither torch nor transformers."""

import json
from collections.abc import Container, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .errors import BarberError
from .fields import one_of

BOS = ("auto", "always", "never", "once")
BOS_HELP = "auto (all, if the tokenizer adds it to a text), always, never, or once (the text does, if anything)"


class CalibrationConfig(BaseModel):
    """The calibration windows of a run, except for the seed, which random masks share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: list[str] = Field(
        default_factory=list,
        description="text or JSON files, c4, wikitext2, ptb, or pydoc, which needs no download (default: c4)",
    )
    text_field: str = Field("text", description="field of a JSON file that holds the text or chat messages")
    samples: int = Field(128, ge=1, description="number of calibration windows")
    sequence_length: int | None = Field(
        None, ge=1, description="tokens per window (default: 2048, or the model's maximum if that is less)"
    )
    bos: Annotated[str, one_of("bos", BOS)] = Field("auto", description=f"windows that begin with BOS: {BOS_HELP}")

    @model_validator(mode="before")
    @classmethod
    def _from_texts(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise BarberError(f"calibration {value!r} is one string: give a list of texts")
        return {"texts": list(value)} if isinstance(value, list | tuple) else value


FLAT = ("text_field", "samples", "sequence_length", "bos")  # beside `calibration` in flags, recipes and version 0.1.0


def at_least(name: str, least: int) -> AfterValidator:
    """Return a validator of calibration settings: field `name`, if set, is at least `least`."""

    def check(calibration: CalibrationConfig) -> CalibrationConfig:
        value = getattr(calibration, name)
        if value is not None and value < least:
            raise BarberError(f"{name} {value} is not legal: at least {least}")
        return calibration

    return AfterValidator(check)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Move the flat calibration settings, and the list `calibration` of texts, into nested settings."""
    settings = dict(flat)
    calibration = {name: settings.pop(name) for name in FLAT if name in settings}
    if "calibration" in settings:
        calibration["texts"] = settings.pop("calibration")
    if calibration:
        settings["calibration"] = calibration
    return settings


def refuse_flat(owner: str, settings: Mapping[str, Any], own: Container[str] = ()) -> None:
    """Refuse calibration settings in the flat form of version 0.1.0, unless they are `own` fields of `owner`.

    Raises:
        BarberError: shows the nested form.
    """
    moves: list[str] = []
    example: dict[str, Any] = {}
    if isinstance(settings.get("calibration"), list):
        example["texts"] = settings["calibration"]
    for name in FLAT:
        if name in settings and name not in own:
            moves.append(f"{name} is now calibration.{name}")
            example[name] = settings[name]
    if moves:
        raise BarberError(f"{', '.join(moves)}: {owner}(calibration={json.dumps(example, default=str)})")


class Calibrated(BaseModel):
    """Settings with a field `calibration`; the flat form of version 0.1.0 is refused."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_flat(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            refuse_flat(cls.__name__, value, cls.model_fields)
        return value
