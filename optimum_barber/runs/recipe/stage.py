"""What a stage of a recipe is: settings, what it may follow, and a function from one directory to the next."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ...base.calibration import CalibrationConfig
from ...base.fields import DTYPES, PRECISIONS, one_of
from ...base.files import read_json_object
from ...base.registry import Registry
from ...prune.settings import BarberConfig

RUN_NAME = "run.json"
STAGE_NAME = "stage.json"
MODEL = "model"  # the folder of a stage's directory that holds the model, or the adapter, that it made
Settings = TypeVar("Settings", bound=BaseModel)


def read_stage(directory: Path) -> dict[str, Any]:
    """Return the record of a stage: kind, fingerprint, figures; empty where it is not done.

    Raises:
        BarberError: the record is broken.
    """
    path = directory / STAGE_NAME
    return read_json_object(path) if path.is_file() else {}


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return all numbers by their path, such as `perplexity/pydoc/perplexity`, as trackers want them."""
    numbers: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + key] = value
    return numbers


class Calibration(CalibrationConfig):
    """The calibration set of all stages."""

    texts: list[str] = Field(
        ["c4"], min_length=1, description="text or JSON files, c4, wikitext2, ptb or pydoc, which is always there"
    )
    sequence_length: int | None = Field(
        None, ge=2, description="tokens a window; default 2048, or what the model takes"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="decides the windows, random masks and the order of training")


class SharedSettings(BaseModel):
    """The settings of a recipe that hold for all its stages."""

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
    precision: Annotated[str, one_of("precision", PRECISIONS)] = Field(
        "auto",
        description="of float32 matrix products while masks are made: auto, highest, high (TF32), medium (bfloat16)",
    )

    def run_settings(self) -> dict[str, Any]:
        """Return calibration, seed and device under the names that the settings of every run give them."""
        calibration = CalibrationConfig(**self.calibration.model_dump(exclude={"seed"}))
        return {"calibration": calibration, "seed": self.calibration.seed, "device": self.device}

    def barber_config(self, **settings: Any) -> BarberConfig:
        """Return the settings of a pruning run on this calibration set."""
        return BarberConfig(**self.run_settings(), dtype=self.dtype, precision=self.precision, **settings)


@dataclass
class StageContext:
    """What a stage works with.

    Attributes:
        shared: settings of the recipe that hold for all stages.
        input_model: the model, or the adapter, that the stage begins with.
        dense_model: the one that the masks are made for: the recipe's own, or what a stage cut out of it.
        directory: where the stage writes; it is put in place only when the stage is done.
        scratch: a folder that outlives a kill, for a stage that can go on half-way.
        earlier: figures of the stages before, by their directory's name.
        settings: of the whole recipe, as one level of plain values.
        quiet: no progress bars.
        log: takes figures for the trackers, with a step.
    """

    shared: SharedSettings
    input_model: str
    dense_model: str
    directory: Path
    scratch: Path
    earlier: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    quiet: bool
    log: Callable[[Mapping[str, Any], int | None], None]

    @property
    def output_model(self) -> Path:
        """Where the stage's model goes."""
        return self.directory / MODEL


class Stage(BaseModel):
    """Settings of one stage; `run` does it.

    Attributes:
        kind: the stage's name in a recipe.
        follows: states of the model that it may begin with.
        gives: state of the model that it leaves; None where it makes no model.
        first: the setting under which a fault of several settings is reported.
        needs_model: whether `check_model` looks at the model.
        reshapes: whether the model that it leaves has other shapes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    follows: ClassVar[tuple[str, ...]]
    gives: ClassVar[str | None] = None
    first: ClassVar[str] = ""
    needs_model: ClassVar[bool] = False
    reshapes: ClassVar[bool] = False

    def part(self, settings: type[Settings]) -> Settings:
        """Return those settings of the stage that are fields of `settings`; what a recipe leaves out stays unset."""
        chosen = {}
        for name in settings.model_fields:
            if name in self.model_fields_set:
                chosen[name] = getattr(self, name)
        return settings(**chosen)

    def files(self) -> list[str]:
        """Return files and directories that the stage reads, beside its model."""
        return []

    def texts(self) -> list[str]:
        """Return texts that the stage reads, files or registered names."""
        return []

    def check(self, shared: SharedSettings, earlier: Sequence["Stage"]) -> None:
        """Check the settings beyond each on its own; raises BarberError, a line a fault, or ValidationError."""

    def check_model(self, model: Any, earlier: Sequence["Stage"]) -> None:
        """Check the settings against the recipe's model, which has no weights; raises BarberError."""

    def run(self, context: StageContext) -> dict[str, Any]:
        """Do it, and return the figures."""
        raise NotImplementedError


STAGES: Registry[type[Stage]] = Registry("stage")


def stage(kind: str) -> Callable[[type[Stage]], type[Stage]]:
    """Register the decorated class as the stage `kind`."""

    def decorate(made: type[Stage]) -> type[Stage]:
        made.kind = kind
        return STAGES.add(kind, made)

    return decorate
