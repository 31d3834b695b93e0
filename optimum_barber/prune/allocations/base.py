"""Allocations: functions that share the sparsity out over the blocks of a model, out of a look at the dense one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...base.errors import BarberError
from ...base.fields import parse_arguments
from ...base.registry import Registry
from ...models.activations import Activations
from ...models.source import ModelSource
from ...tensors.budget import Shares
from ...tensors.patterns import SparsityPattern
from ..block_cache import Masks
from ..pipeline import Plan, observe, produce
from ..stream import advance
from ..trial import Trial


@dataclass
class Budget:
    """What there is to share out, and the dense model to look at.

    Attributes:
        target: share of all weights to prune, in (0, 1).
        weights: prunable weights of each block, by name, in the order of the model; blocks without any are left out.
        source: the decoder layers, which stay as they are.
        windows: (samples, length) int64, the calibration tokens of all ranks.
        quiet: no progress bar.
    """

    target: float
    weights: dict[str, int]
    source: ModelSource
    windows: Tensor
    plan: Plan
    quiet: bool = False

    def trials(
        self, needs: Iterable[str], samples: int | None = None, relative: bool = False
    ) -> Iterator[tuple[str, str, Trial]]:
        """Names of the layer and of the block, and the block on trial, one after the other, on the dense stream.

        Args:
            needs: names of the input statistics to collect, out of `STATISTICS`; `masks` takes those of the producer.
            samples: how many of the calibration windows to run; None for all.
            relative: whether errors are relative to each token's residual stream behind the block.
        """
        producer = replace(self.plan.producer, needs=frozenset(needs))
        plan = replace(self.plan, producer=producer, relative_error=relative)
        windows = self.windows[:samples]
        share = plan.ranks.share(len(windows))
        hidden = Activations(self.source.begin(windows[share.slice]), plan.batch_size, plan.scratch, share)
        with tqdm(total=len(self.weights), unit="block", desc="allocation", disable=self.quiet or None) as bar:
            for layer in self.source.layers():
                outputs: list[Activations] = []
                for block in layer.blocks:
                    trial = observe(layer, block, hidden, outputs, plan)
                    outputs.append(trial.targets)
                    if trial.linears:
                        yield layer.name, block.name, trial
                        bar.update()
                hidden = advance(layer, hidden, outputs)

    def masks(self, trial: Trial, sparsity: float) -> Masks:
        """The producer's masks of a block at a sparsity; weights that it changes are those of `trial` from now on."""
        return produce(trial, replace(self.plan, pattern=SparsityPattern(sparsity, whole=True)))

    def check_spread(self, allocation: str, spread: float) -> None:
        """Refuse a spread around the target that has no room on one of its sides."""
        target, most = self.target, min(self.target, 1 - self.target)
        if not 0 < spread < most:
            place = f"of allocation {allocation!r} is not legal at sparsity {target:g}"
            raise BarberError(f"spread {spread:g} {place}: above 0 and below {most:g}")


AllocationFunction = Callable[..., Shares]  # takes a `Budget` and keyword-only arguments
ALLOCATIONS: Registry[AllocationFunction] = Registry("allocation", "optimum_barber.allocations")
allocation = ALLOCATIONS.register


@torch.no_grad()
def share_out(name: str, arguments: dict[str, Any], budget: Budget) -> Shares:
    """Ask an allocation, with its arguments as a user wrote them, and check its answer.

    Raises:
        BarberError: it does not take these arguments, or does not share out the budget among these blocks.
    """
    function = ALLOCATIONS[name]
    shares = function(budget, **parse_arguments(function, name, arguments, "allocation"))
    if not isinstance(shares, Shares) or set(shares.sparsity) != set(budget.weights):
        raise BarberError(f"allocation {name!r} gives no share of each of the {len(budget.weights)} blocks")
    for block, sparsity in shares.sparsity.items():
        if not 0 < sparsity < 1:
            raise BarberError(f"allocation {name!r} gives {block} the sparsity {sparsity:g}, outside of (0, 1)")
    return shares


@allocation("uniform")
def uniform(budget: Budget) -> Shares:
    """Give every block the target; the model is not looked at."""
    return Shares(dict.fromkeys(budget.weights, budget.target))
