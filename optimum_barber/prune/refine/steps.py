"""The steps of a refinement: the gradient on a few windows, then one exchange in every row that gains by it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from ...base.errors import BarberError
from ..block_cache import Masks
from ..block_quadratic import correlations, expand
from ..rebuilders.base import swap_count
from ..rebuilders.gauss_newton import shortened
from ..rebuilders.swaps import with_exchanges
from ..trial import Trial
from .settings import RefineSettings
from .whole import part_of

MEASURING = 8  # every eighth window measures, the others are learned from
EXPANDED = 24  # at least so many windows, if there are, make the Gram matrices of all steps
MOMENTUM = 0.8  # share of the gradient before in that of a step
MOVING = 0.7  # share of the rows that make an exchange in the first step
SHORTEST = 2**-16  # step that is tried
LOOK = 10  # steps between two measurements
PATIENCE = 3  # measurements without a gain after which the steps end


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
    learned from measure the masks after every `LOOK` steps, and those with the least divergence are returned.

    `trial` is the whole model; `report` is told after each step how many there were, and the least divergence so far.

    Raises:
        BarberError: the divergence is not finite.
    """
    windows = range(trial.inputs.total)
    measuring = part_of(trial, windows[::MEASURING])
    learned = [window for window in windows if window % MEASURING]
    divergence = _finite_error(measuring, masks)
    model = RowModel(part_of(trial, spread(learned, EXPANDED)), masks, settings)
    search = Search(masks, masks, divergence, model.first_length(masks))
    batches = batches_of(learned, settings.batch_size)
    for step in range(settings.steps):
        if step:
            model.learn(part_of(trial, batches[step % len(batches)]), search.masks)
        search.masks = model.exchanged(search.masks, search.length * (1 - step / settings.steps))
        if (step + 1) % LOOK == 0 or step + 1 == settings.steps:
            search.look(step + 1, measuring.error(search.masks))
            if search.vain:
                model.forget()
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
    """The masks of now and the best ones so far.

    Attributes:
        length: of a step at the beginning; halved, and the best masks taken up again, where a look finds no gain.
        vain: looks without a gain since the last one with.
        looks: a record of each.
    """

    masks: Masks
    best: Masks
    lowest: float
    length: float
    vain: int = 0
    looks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._record(0, self.lowest)

    def look(self, step: int, divergence: float) -> None:
        """Compare the masks of now, of this divergence, with the best ones, and go on with the better."""
        self._record(step, divergence)
        if divergence < self.lowest:
            self.best, self.lowest, self.vain = self.masks, divergence, 0
        else:
            self.masks, self.length, self.vain = self.best, self.length / 2, self.vain + 1

    def _record(self, step: int, divergence: float) -> None:
        swaps = swap_count(self.best, self.masks)
        self.looks.append({"step": step, "divergence": divergence, "swaps": swaps, "length": self.length})


class RowModel:
    """Twice the divergence as a quadratic function of every row's weights, whose gradient follows the masks.

    Gram matrices and worths of rows are those of the first windows. The gradient is a running mean over the batches
    that were learned from; after an exchange in a row it is that of the row's quadratic at the new weights.
    """

    def __init__(self, first: Trial, masks: Masks, settings: RefineSettings) -> None:
        self._first, self._settings = first, settings
        self.expansion = expand(first, masks, list(first.linears), settings.shrinkage)
        self._forgotten = False

    def learn(self, batch: Trial, masks: Masks) -> None:
        """Take the gradient on a batch of windows into the running mean."""
        share = 1.0 if self._forgotten else 1 - MOMENTUM
        for name, correlation in correlations(batch, masks, self.expansion, self._settings.shrinkage):
            self.expansion.models[name].correlation.lerp_(correlation, share)
        self._forgotten = False

    def forget(self) -> None:
        """Drop the running mean: what is learned next replaces it."""
        self._forgotten = True

    def first_length(self, masks: Masks) -> float:
        """The least power of two, at most 1, of a step in which a share of `MOVING` of the rows makes an exchange."""
        enough = MOVING * sum(len(keep) for keep in masks.values())
        length = SHORTEST
        while length < 1 and swap_count(masks, self._stepped(masks, length)) < enough:
            length *= 2
        return length

    def exchanged(self, masks: Masks, length: float) -> Masks:
        """The masks after a step of this length; the gradient moves with them."""
        candidate = self._stepped(masks, length)
        if candidate is not masks:
            self._follow(masks, candidate)
        return candidate

    def _stepped(self, masks: Masks, length: float) -> Masks:
        models = shortened(self.expansion.models, length)
        return with_exchanges(self._first, masks, models, self._settings.exchanges)

    def _follow(self, before: Masks, after: Masks) -> None:
        for name, model in self.expansion.models.items():
            moved = (before[name] != after[name]).any(1)
            change = self._first.weight(name, after[name])[moved] - self._first.weight(name, before[name])[moved]
            model.correlation[moved] -= change @ model.gram


def batches_of(windows: Sequence[int], size: int) -> list[list[int]]:
    """All windows in batches of this size or one more, each from the whole text and so from all ranks."""
    count = max(len(windows) // size, 1)
    return [list(windows[first::count]) for first in range(count)]


def spread(windows: Sequence[int], least: int) -> list[int]:
    """At least so many of the windows, all if there are fewer than twice as many, evenly spread."""
    return list(windows[:: max(len(windows) // least, 1)])
