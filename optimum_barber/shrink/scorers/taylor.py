"""LLM-Pruner's first-order criterion (arXiv 2305.11627): one backward pass through the whole model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...base.errors import BarberError
from ...base.memory import free_memory
from ...models.calls import forward_of
from ...models.source import working_copy
from ..units import linear_of, linears_of_units
from .base import ModelInput, scorer


@scorer("taylor", whole_model=True)
def taylor(inputs: ModelInput) -> list[dict[str, Tensor]]:
    """Sum of |w * dL/dw| over all weights of a unit; L is the mean language-model loss of the windows.

    Only the inputs of the decoder layers are kept on the way; each layer is computed again in the backward pass.

    Raises:
        BarberError: model and gradients do not fit into the memory at hand.
    """
    source = inputs.source
    names = sorted(linears_of_units(inputs.units))
    linears = []
    for layer in source.stack:
        linears.append({name: linear_of(layer, name) for name in names})
    weights = [linear.weight for layer in linears for linear in layer.values()]
    _check_memory(source.model, weights, source.device)
    scores = []
    with working_copy(source.model, source.device, torch.float32), _only(source.model, weights):
        with ExitStack() as stack:
            for layer in source.stack:  # keeps nothing but its input for the backward pass
                stack.enter_context(forward_of(layer, partial(checkpoint, layer.forward, use_reentrant=False)))
            for window in inputs.windows.split(1):
                (_loss_of(source.model, window.to(source.device)) / len(inputs.windows)).backward()
        for members in linears:
            products = {}
            for name, linear in members.items():
                assert linear.weight.grad is not None
                products[name] = (linear.weight.detach() * linear.weight.grad).abs()
                linear.weight.grad = None
            scores.append({kind: units.sums(products) for kind, units in inputs.units.items()})
    return scores


def _loss_of(model: nn.Module, window: Tensor) -> Tensor:
    """Mean negative log-likelihood of a window, (1, length)."""
    logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, window[0, 1:])


def _check_memory(model: nn.Module, weights: list[Tensor], device: torch.device) -> None:
    """Refuse what would not fit: the model in float32, and a gradient for each of `weights`."""
    copy = 0
    for parameter in model.parameters():
        present = parameter.element_size() if parameter.device == device else 0
        copy += parameter.numel() * (4 - present)
    need = max(copy, 0) + 4 * sum(weight.numel() for weight in weights)
    free = free_memory(device)
    if free is not None and need > free:
        raise BarberError(
            f"scorer 'taylor' needs {need / 2**30:.3g} GiB beside the model for its gradients, {free / 2**30:.3g} GiB "
            f"are free on {device}: take bip, which needs one decoder layer at a time"
        )


@contextmanager
def _only(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Context manager: these parameters have gradients and no others."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(weight) for weight in weights}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
