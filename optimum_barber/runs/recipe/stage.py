"""What a stage of a recipe is: settings, what it may follow, and a function from one directory to the next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ...base.registry import Registry

if TYPE_CHECKING:
    from .schema import Recipe

MODEL = "model"  # the folder of a stage's directory that holds the model, or the adapter, that it made


def _unheard(figures: Mapping[str, Any], step: int | None) -> None:
    """Where nobody follows the run."""


@dataclass
class Work:
    """What a stage is given to work with.

    Attributes:
        recipe: the whole recipe.
        model: the model, or the adapter, that the stage begins with.
        directory: where the stage writes; it is put in place only when the stage is done.
        scratch: a folder that outlives a kill, for a stage that can go on half-way.
        earlier: figures of the stages before, by their directory's name.
        base: the dense model that the masks are made for: the recipe's own, or what a stage cut out of it.
        quiet: no progress bars.
        log: takes figures for the trackers, with a step.
    """

    recipe: "Recipe"
    model: str
    directory: Path
    scratch: Path
    base: str
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    quiet: bool = False
    log: Callable[[Mapping[str, Any], int | None], None] = _unheard

    @property
    def target(self) -> Path:
        """Where the stage's model goes."""
        return self.directory / MODEL


class Stage(BaseModel):
    """Settings of one stage; `run` does it.

    Attributes:
        kind: the stage's name in a recipe.
        follows: states of the model that it may begin with.
        gives: state of the model that it leaves; None where it makes no model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    follows: ClassVar[tuple[str, ...]]
    gives: ClassVar[str | None] = None

    def files(self) -> list[str]:
        """Files and directories that the stage reads, beside its model."""
        return []

    def texts(self) -> list[str]:
        """Texts that the stage reads, files or registered names."""
        return []

    def faults(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """What is wrong with the settings beyond each on its own: (setting, message)."""
        return []

    def run(self, work: Work) -> dict[str, Any]:
        """Do it, and return the figures."""
        raise NotImplementedError


STAGES: Registry[type[Stage]] = Registry("stage")


def stage(kind: str) -> Callable[[type[Stage]], type[Stage]]:
    """Register the decorated class as the stage `kind`."""

    def decorate(made: type[Stage]) -> type[Stage]:
        made.kind = kind
        return STAGES.add(kind, made)

    return decorate
