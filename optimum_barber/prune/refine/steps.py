"""The steps of a refinement: the gradient on a few windows, then exchanges in every row that gains by them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite, sqrt
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
FACTOR = sqrt(2)  # between two lengths that are tried
LONGER = sqrt(2)  # times the best single step are those by a running gradient at the beginning
LOOK = 10  # steps between two measurements, fewer where there are few steps
PATIENCE = 3  # measurements in a row without a gain worth its time, after which the steps end
WORTH_ITS_TIME = 0.003  # share of the divergence


def refined(
    trial: Trial,
    masks: Masks,
    settings: RefineSettings,
    report: Callable[[int, float], None] = lambda step, lowest: None,
) -> tuple[Masks, list[dict[str, Any]]]:
    """Better masks, and a record of each measurement; the very ones that were given where nothing is better.

    A step takes the divergence for quadratic around the masks, by the rows of all Linears (`block_quadratic`), with the
    gradient on the next few windows. In each row it exchanges the pruned weight that gains most by itself for the kept
    one that then suits it best (inside N:M groups the best pair), if that lowers the row's part. Windows that are not
    learned from measure the masks every few steps, and those with the least divergence are returned.

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
    search = Search(masks, masks, divergence, LONGER * best_length(model, measuring, masks, settings.exchanges))
    batches = batches_of(learned, settings.batch_size)
    every = min(LOOK, max(settings.steps // 6, 1))
    for step in range(settings.steps):
        if step:
            model.learn(part_of(trial, batches[step % len(batches)]), search.masks)
        length = search.length * (1 - step / settings.steps)
        search.masks = model.step(search.masks, length)
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            candidate = search.masks
            search.look(step + 1, measuring.error(candidate), length)
            model.follow(candidate, search.masks)
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
    """The masks of now, and the best ones that a look has measured.

    Attributes:
        lowest: divergence of the best masks.
        length: of the next step, before it falls with the number of steps.
        vain: looks in a row without a gain that is worth its time.
        looks: a record of each, the first of the masks that were given.
    """

    masks: Masks
    best: Masks
    lowest: float
    length: float
    vain: int = 0
    looks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.looks.append({"step": 0, "divergence": self.lowest, "swaps": 0, "length": 0.0})

    def look(self, step: int, divergence: float, length: float) -> None:
        """Go on from the masks of now if their divergence is the least, else from the best ones in steps half as long.

        `length` is that of the latest step, for the record.
        """
        swaps = swap_count(self.best, self.masks)
        self.looks.append({"step": step, "divergence": divergence, "swaps": swaps, "length": length})
        self.vain = 0 if divergence < (1 - WORTH_ITS_TIME) * self.lowest else self.vain + 1
        if divergence < self.lowest:
            self.best, self.lowest = self.masks, divergence
            return
        self.masks = self.best
        if swaps:
            self.length /= 2


def best_length(model: RowModel, measuring: Trial, masks: Masks, exchanges: int) -> float:
    """The length of the step that lowers the measured divergence most; the first one tried if none does."""
    start = first_tried(model, masks)
    return best_step(measuring, model, masks, start, exchanges, 1, FACTOR, SHORTEST, parabolic=False).length


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
