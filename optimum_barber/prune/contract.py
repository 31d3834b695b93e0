"""A producer's answer for one Linear, checked before anything is done with it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.errors import BarberError
from ..tensors.masks import count_all, holds_pattern
from ..tensors.patterns import SparsityPattern
from .producers import LinearInput, Produced, Producer


def ask(producer: Producer, linear: LinearInput, arguments: Mapping[str, Any], exact: bool) -> Produced:
    """The producer's keep mask, and new weights where it gives any, on the device of the Linear.

    With `exact` it must meet the pattern's sparsity; masks from outside bring their own.

    Raises:
        BarberError: whose answer it is, what was expected, and what came.
    """
    function, version = producer.function, linear.weight._version
    author = f"producer {function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    answer = function(linear, **arguments)
    if linear.weight._version != version:
        raise BarberError(f"{author}: it changed the weight of {linear.name} in place; work on a copy")
    if not isinstance(answer, Produced):
        answer = Produced(answer)
    whose = f"{author}: its mask for {linear.name}"
    _check_mask(whose, answer.keep, linear.weight.shape, linear.pattern)
    if exact:
        pruned, most = int((~answer.keep).sum()), linear.pattern.pruned(answer.keep.numel())
        # floor(ratio * n) a comparison group: fewer than one weight a group is lost, and rows or columns are the finest
        if not most - max(answer.keep.shape) < pruned <= most:
            raise BarberError(f"{whose} prunes {pruned} of {answer.keep.numel()} weights, expected {most}")
    keep = answer.keep.to(linear.weight.device)
    if answer.weight is None:
        return Produced(keep)
    return Produced(keep, _check_weight(f"{author}: its weight for {linear.name}", answer.weight, keep, linear.weight))


def check_rebuilt(
    name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], pattern: SparsityPattern
) -> None:
    """Check the masks of the block `name` after a rebuilder against those before: Linears, shapes, pattern and count.

    A rebuilder may move weights between Linears, not win or lose any.
    """
    if list(after) != list(before):
        raise BarberError(f"rebuilder's masks for {name} are of {list(after)}, expected {list(before)}")
    for linear, keep in after.items():
        _check_mask(f"rebuilder's mask for {linear}", keep, before[linear].shape, pattern)
    kept, expected = kept_weights(after), kept_weights(before)
    if kept != expected:
        raise BarberError(f"rebuilder's masks for {name} keep {kept} weights, expected {expected} as before")


def kept_weights(masks: Mapping[str, Tensor]) -> int:
    """The number of weights that the masks of a block keep."""
    return count_all(masks.values())


def _check_mask(whose: str, keep: Any, shape: torch.Size, pattern: SparsityPattern) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != shape:
        raise BarberError(f"{whose} is {_described(keep)}, expected torch.bool {tuple(shape)}")
    if not holds_pattern(keep, pattern):
        raise BarberError(f"{whose} does not hold the pattern {pattern}")


def _check_weight(whose: str, weight: Any, keep: Tensor, dense: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != keep.shape:
        raise BarberError(f"{whose} is {_described(weight)}, expected floating point {tuple(keep.shape)}")
    weight = weight.to(dense)
    if not torch.isfinite(weight[keep]).all():
        raise BarberError(f"{whose} has NaN or Inf where it is kept")
    return weight


def _described(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"{answer.dtype} {tuple(answer.shape)}"
    return type(answer).__name__
