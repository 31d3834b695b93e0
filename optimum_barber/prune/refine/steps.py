"""The steps of a refinement: the gradient on a few windows, then exchanges in every row that gains by them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any

from ...base.errors import BarberError
from ..block_cache import Masks
from ..block_quadratic import correlations, expand
from ..rebuilders.base import swap_count
from ..rebuilders.gauss_newton import best_step, shortened
from ..rebuilders.ratio import stride_of
from ..rebuilders.swaps import with_exchanges
from ..trial import Trial
from .settings import RefineSettings
from .whole import part_of

GRAM_WINDOWS = 24  # the Gram matrices of all steps come from at least so many windows, or from all
MOMENTUM = 0.8  # share of the gradient before in that of a step
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
    search = Search(masks, masks, divergence, LONGER * model.best_length(measuring, masks))
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


class RowModel:
    """Twice the divergence as a quadratic function of every row's weights, whose gradient follows the masks.

    Gram matrices and worths of rows are of the windows of `sample`. The gradient is a running mean over the batches
    that were learned from; where a row's weights change, its part changes as the row's quadratic says.
    """

    def __init__(self, sample: Trial, masks: Masks, settings: RefineSettings) -> None:
        self._sample, self._settings = sample, settings
        self.expansion = expand(sample, masks, list(sample.linears), settings.shrinkage)

    def learn(self, batch: Trial, masks: Masks) -> None:
        """Take the gradient on a batch of windows into the running mean."""
        for name, correlation in correlations(batch, masks, self.expansion, self._settings.shrinkage):
            self.expansion.models[name].correlation.lerp_(correlation, 1 - MOMENTUM)

    def best_length(self, measuring: Trial, masks: Masks) -> float:
        """The length of the step that lowers the measured divergence most; the first one tried if none does."""
        start = self._first_tried(masks)
        models, exchanges = self.expansion.models, self._settings.exchanges
        return best_step(measuring, models, masks, start, exchanges, 1, FACTOR, SHORTEST, parabolic=False).length

    def _first_tried(self, masks: Masks) -> float:
        """The least power of two, at most 1, of a step in which a share of `MOVING` of the rows takes part.

        Rows that not even a step of length 1 changes do not count, such as those of an expert without tokens.
        """
        enough = MOVING * rows_changed(masks, self._stepped(masks, 1.0))
        length = SHORTEST
        while length < 1 and rows_changed(masks, self._stepped(masks, length)) < enough:
            length *= 2
        return length

    def step(self, masks: Masks, length: float) -> Masks:
        """The masks after a step of this length, by which the gradient changes too."""
        candidate = self._stepped(masks, length)
        self.follow(masks, candidate)
        return candidate

    def _stepped(self, masks: Masks, length: float) -> Masks:
        models = shortened(self.expansion.models, length)
        return with_exchanges(self._sample, masks, models, self._settings.exchanges)

    def follow(self, before: Masks, after: Masks) -> None:
        """Make the gradient at some masks that at others: C' loses D G' for the change D of a row."""
        if before is after:
            return
        for name, model in self.expansion.models.items():
            rows = (before[name] != after[name]).any(1)
            change = self._sample.weight(name, after[name])[rows] - self._sample.weight(name, before[name])[rows]
            model.correlation[rows] -= change @ model.gram


def rows_changed(before: Masks, after: Masks) -> int:
    """The number of rows whose mask is another one."""
    return sum(int((before[name] != after[name]).any(1).sum()) for name in before)


def measuring_stride(windows: int) -> int:
    """Every how many windows one measures, where the others are learned from: every eighth, more of fewer than 16."""
    return max(stride_of(windows), 2)


def batches_of(windows: Sequence[int], size: int) -> list[list[int]]:
    """All windows in batches of about this size, each from the whole text and so from all ranks."""
    count = max(round(len(windows) / size), 1)
    return [list(windows[first::count]) for first in range(count)]


def gram_windows(windows: Sequence[int], ranks: int) -> list[int]:
    """Every n-th of the windows, n as large as leaves `GRAM_WINDOWS`, and some of every rank; all if there are few."""
    least = max(GRAM_WINDOWS, 2 * ranks)
    return list(windows[:: max(len(windows) // least, 1)])
