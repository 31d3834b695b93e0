"""The steps of a refinement: the gradient on a few windows, then exchanges in every row that gains by them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from ...base.errors import BarberError
from ..block_cache import Masks
from ..rebuilders.base import swap_count
from ..rebuilders.gauss_newton import best_step
from ..trial import Trial
from .row_model import RowModel
from .settings import RefineSettings
from .whole import part_of
from .windows import batches_of, gram_windows, measuring_stride

MOVING = 0.1  # share of the rows that take part in the first step that is tried, of those that do at length 1
SHORTEST = 2**-16  # the least length that is tried
FACTOR = 2.0  # between two lengths that are tried
LOOK = 6  # steps between two looks, fewer where there are few steps
PATIENCE = 3  # looks in a row without a gain worth its time, after which the steps end
WORTH_ITS_TIME = 0.003  # share of the divergence


def refined(
    trial: Trial,
    masks: Masks,
    settings: RefineSettings,
    report: Callable[[int, float], None] = lambda step, lowest: None,
) -> tuple[Masks, list[dict[str, Any]]]:
    """Better masks, and a record of each look; the very ones that were given where nothing is better.

    A step takes the divergence for quadratic around the masks, by the rows of all Linears (`block_quadratic`), with the
    gradient on the next few windows. In each row it exchanges the pruned weight that gains most by itself for the kept
    one that then suits it best (inside N:M groups the best pair), if that lowers the row's part. Every few steps is a
    look: windows that are not learned from measure the masks, and how long this step and the next ones should be. The
    masks with the least divergence are returned.

    `trial` is the whole model; `report` is told after each step how many there were, and the least divergence so far.

    Raises:
        BarberError: the divergence is not finite.
    """
    windows = range(trial.inputs.total)
    stride = measuring_stride(len(windows))
    measuring = part_of(trial, windows[::stride])
    learned = [window for window in windows if window % stride]
    divergence = _finite_error(measuring, masks)
    model = RowModel(part_of(trial, gram_windows(learned, trial.ranks.count)), masks, settings)
    search = Search(model, measuring, settings.exchanges, masks, divergence, first_tried(model, masks))
    batches = batches_of(learned, settings.batch_size)
    every = min(LOOK, max(settings.steps // 6, 1))
    for step in range(settings.steps):
        if step:
            model.learn(part_of(trial, batches[step % len(batches)]), search.masks)
        if step % every == 0 or step + 1 == settings.steps:
            search.look(step + 1)
        else:
            search.step()
        report(step + 1, search.lowest)
        if search.vain == PATIENCE:
            break
    return search.best, search.looks


def _finite_error(trial: Trial, masks: Masks) -> float:
    divergence = trial.error(masks)
    if not isfinite(divergence):
        raise BarberError(f"divergence from the dense model is {divergence}: NaN or Inf in its weights?")
    return divergence


@dataclass
class Search:
    """Masks that move by steps of a row model, and the best ones that a look has measured.

    Attributes:
        lowest: divergence of the best masks on the windows of `measuring`.
        length: of the next steps. Short ones exchange what costs a row little for its gain; once that is used up, only
            longer ones gain.
        masks: those of now.
        vain: looks in a row without a gain that is worth its time.
        looks: a record of each, and of the masks that were given.
    """

    model: RowModel
    measuring: Trial
    exchanges: int
    best: Masks
    lowest: float
    length: float
    vain: int = 0
    looks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masks = self.best
        self.looks.append({"step": 0, "divergence": self.lowest, "swaps": 0, "length": 0.0})

    def step(self) -> None:
        """Take a step, not measured."""
        self.masks = self.model.step(self.masks, self.length)

    def look(self, number: int) -> None:
        """From the masks of now, or the best ones if these are better, take the step that is measured to help most."""
        before, divergence = self.best, self.lowest
        self._keep_the_better()
        step = best_step(
            self.measuring, self.model, self.best, self.length, self.exchanges, 1, FACTOR, SHORTEST, parabolic=False
        )
        if step.masks is not self.best:
            self.model.follow(self.best, step.masks)
            self.length, self.lowest = step.length, step.errors[step.length]
            self.best = self.masks = step.masks
        swaps = swap_count(before, self.best)
        self.looks.append({"step": number, "divergence": self.lowest, "swaps": swaps, "length": self.length})
        self.vain = 0 if self.lowest < (1 - WORTH_ITS_TIME) * divergence else self.vain + 1

    def _keep_the_better(self) -> None:
        """Take the masks of now for the best ones, or go back to these: the steps since were too long."""
        divergence = self.measuring.error(self.masks)
        if divergence < self.lowest:
            self.best, self.lowest = self.masks, divergence
        elif self.masks is not self.best:
            self.model.follow(self.masks, self.best)
            self.masks = self.best
            self.length /= FACTOR


def first_tried(model: RowModel, masks: Masks) -> float:
    """The least power of two, at most 1, of a step in which a share of `MOVING` of the rows takes part.

    Rows that not even a step of length 1 changes do not count, such as those of an expert without tokens.
    """
    enough = MOVING * rows_changed(masks, model.stepped(masks, 1.0))
    length = SHORTEST
    while length < 1 and rows_changed(masks, model.stepped(masks, length)) < enough:
        length *= 2
    return length


def rows_changed(before: Masks, after: Masks) -> int:
    """The number of rows whose mask is another one."""
    return sum(int((before[name] != after[name]).any(1).sum()) for name in before)
