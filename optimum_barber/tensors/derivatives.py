"""Gradients by some of a block's parameters, one parameter at a time. Torch only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def differentiable(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Gradients for these parameters and no others, even inside `no_grad`."""
    before = [leaf.requires_grad for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for leaf, required in zip(leaves, before, strict=True):
            leaf.requires_grad_(required)


def backward(
    output: Tensor,
    leaves: Mapping[str, Tensor],
    see: Callable[[str, Tensor], None],
    output_gradient: Tensor | None = None,
    again: bool = False,
) -> None:
    """Show `see` the gradient of each leaf as soon as it is made, so that only one is there at a time.

    Args:
        output: that is differentiated; a scalar unless its gradient is `output_gradient`.
        leaves: by name, without a `grad`, which stays empty; several names may have the same one.
        see: takes a name and a gradient of the leaf's shape, which it may overwrite.
        again: whether the graph is needed once more.
    """
    names: dict[Tensor, list[str]] = {}
    for name, leaf in leaves.items():
        names.setdefault(leaf, []).append(name)

    def take(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        *others, last = names[leaf]
        for name in others:
            see(name, gradient.clone())
        see(last, gradient)

    with ExitStack() as stack:
        for leaf in names:
            stack.callback(leaf.register_post_accumulate_grad_hook(take).remove)
        torch.autograd.backward(output, output_gradient, retain_graph=again, inputs=list(names))
