"""The divergence as a quadratic function of the rows of all Linears, by a running gradient that follows the masks."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...tensors.derivatives import backward
from ...tensors.sums import Sum
from ..block_cache import BlockCache, Masks
from ..block_quadratic import expand, row_worth
from ..quadratic import Quadratic, Shortened
from ..rebuilders.swaps import with_exchanges
from ..trial import SampleResult, Trial
from .grams import gram_matrices
from .settings import RefineSettings

MOMENTUM = 0.8  # share of the gradient before in that of a step


class RowModel(Mapping[str, Quadratic]):
    """Twice the divergence around masks, by Linear: Gram matrix G' and running gradient C' on the model's device.

    Gram matrices and worths of rows are of the windows of `sample`. The gradient is a running mean over the batches
    that were learned from; where a row's weights change, its part changes as the row's quadratic says. Its sums are
    float64, the same on all ranks; they and the Gram matrices wait where the trial's sums do.
    """

    def __init__(self, sample: Trial, masks: Masks, settings: RefineSettings) -> None:
        self._trial, self._settings = sample, settings
        self._samples = sample.inputs.total
        self._grams = gram_matrices(sample, masks, settings.shrinkage)
        expansion = expand(sample, masks, list(sample.linears), settings.shrinkage, grams=self._grams)
        sample.cache = BlockCache()  # frees outputs
        self.worth: dict[str, Tensor] = {}
        self._correlations: dict[str, Sum] = {}
        for name in sample.linears:
            self.worth[name] = row_worth(expansion.worth[name], self._grams[name]).to(self._device(name))
            self._correlations[name] = Sum(sample.sums_on)
            self._correlations[name].add(expansion.models.pop(name).correlation)

    def __getitem__(self, name: str) -> Quadratic:
        device = self._device(name)
        return Quadratic(self._grams[name].to(device), self._correlations[name].value().to(device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._grams)

    def __len__(self) -> int:
        return len(self._grams)

    def learn(self, batch: Trial, masks: Masks) -> None:
        """Take the gradient on a batch of windows into the running mean, scaled as if summed over the sample's.

        C' <- m C' + (1 - m) ((1 - rho) C / h + rho (W - V) diag(G)) with the momentum m, C added window by window.
        """
        new, shrinkage = 1 - MOMENTUM, self._settings.shrinkage
        scale = -new * (1 - shrinkage) * self._samples / batch.inputs.total / 2
        leaves = {name: linear.weight for name, linear in batch.linears.items()}
        for correlation in self._correlations.values():
            correlation.scale(MOMENTUM if batch.ranks.first else 0.0)  # all ranks have the same sum

        def add(result: SampleResult) -> None:
            units = batch.objective.units(result.output)

            def add_gradient(name: str, gradient: Tensor) -> None:
                self._correlations[name].add(gradient.mul_(scale * units).div_(self.worth[name][:, None]))

            backward(result.error, leaves, add_gradient)

        batch.differentiate(masks, add)
        for name, correlation in self._correlations.items():
            if batch.ranks.first:
                missing = batch.weight(name) - batch.weight(name, masks[name])
                correlation.add(missing * self._grams[name].diagonal().to(missing.device) * (new * shrinkage))
            correlation.merge(batch.ranks)

    def step(self, masks: Masks, length: float) -> Masks:
        """The masks after a step of this length, by which the gradient changes too."""
        candidate = self.stepped(masks, length)
        self.follow(masks, candidate)
        return candidate

    def stepped(self, masks: Masks, length: float) -> Masks:
        """The masks after a step of this length, which is only tried."""
        return with_exchanges(self._trial, masks, Shortened(self, length), self._settings.exchanges)

    def follow(self, before: Masks, after: Masks) -> None:
        """Make the gradient at some masks that at others: C' loses D G' for the change D of a row."""
        if before is after:
            return
        for name, correlation in self._correlations.items():
            rows = (before[name] != after[name]).any(1)
            if not rows.any():
                continue
            change = self._trial.weight(name, after[name]) - self._trial.weight(name, before[name])
            change[rows] = -change[rows] @ self._grams[name].to(change.device)
            correlation.add(change)

    def _device(self, name: str) -> torch.device:
        return self._trial.linears[name].weight.device
