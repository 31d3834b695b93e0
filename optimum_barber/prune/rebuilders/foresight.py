"""What a rebuilder begins with, gathered by the one before it while that one measures its last masks."""

from collections.abc import Callable
from typing import Any

from ..rebuild_settings import RebuildConfig
from ..trial import Masks, Trial

Beginning = Callable[[Trial, Masks, RebuildConfig], Any]
BEGINNINGS: dict[str, Beginning] = {}  # by rebuilder; each measures E(masks) on the way
FORESEEING = frozenset({"barber", "swaps", "gauss-newton"})  # rebuilders that call `foresee`
FORESEEN = "what the next rebuilder begins with"  # a note on a trial


def begins(name: str) -> Callable[[Beginning], Beginning]:
    """Register how the named rebuilder looks at the masks that it is given."""

    def register(beginning: Beginning) -> Beginning:
        BEGINNINGS[name] = beginning
        return beginning

    return register


def foresee(trial: Trial, masks: Masks, config: RebuildConfig) -> None:
    """Measure E(masks), the last of a rebuilder, by the first look of the one behind it, if that has one.

    Under `accept: always` nobody asks for that error.
    """
    following = trial.following
    if config.accept != "always" and following in BEGINNINGS and not trial.measured(masks):
        trial.notes[FORESEEN] = masks, (following, config), BEGINNINGS[following](trial, masks, config)


def begin(name: str, trial: Trial, config: RebuildConfig) -> Any:
    """What the named rebuilder begins with at the masks of the trial: as foreseen for them, or gathered now."""
    masks, asked, found = trial.notes.pop(FORESEEN, (None, None, None))
    if masks is trial.masks and asked == (name, config):
        return found
    del found  # its memory, before anything is gathered
    return BEGINNINGS[name](trial, trial.masks, config)
