"""What a stage of a recipe is: settings, what it may follow, and a function from one directory to the next."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from ...base.registry import Registry
from .directory import MODEL
from .shared import SharedSettings

Settings = TypeVar("Settings", bound=BaseModel)


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
        first: the setting that faults of several settings are told of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    follows: ClassVar[tuple[str, ...]]
    gives: ClassVar[str | None] = None
    first: ClassVar[str] = ""

    def part(self, settings: type[Settings]) -> Settings:
        """Return those settings of the stage that are fields of `settings`."""
        return settings(**{name: getattr(self, name) for name in settings.model_fields})

    def files(self) -> list[str]:
        """Return files and directories that the stage reads, beside its model."""
        return []

    def texts(self) -> list[str]:
        """Return texts that the stage reads, files or registered names."""
        return []

    def check(self, shared: SharedSettings, earlier: Sequence["Stage"]) -> None:
        """Check the settings beyond each on its own; raises BarberError, a line a fault, or ValidationError."""

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
