"""Models as callers hold them: out of wrappers, checked, and left in the modes that they came in."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from ..base.errors import BarberError

AUTOCASTS = ("cpu", "cuda", "mps", "xpu")
FOREIGN = ("bitsandbytes.", "torchao.", "optimum.quanto.", "torch.distributed.")  # packed or sharded parameters

Tool = TypeVar("Tool")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Method = Callable[Concatenate[Tool, Arguments], Result]


def causal_lm(wrapped: Any) -> Any:
    """Return the model out of torch.compile, DataParallel and DistributedDataParallel.

    Raises:
        BarberError: it is no model, or one whose weights cannot be read and changed where they are.
    """
    model = wrapped
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            break
    if not isinstance(model, nn.Module):
        raise BarberError(
            f"model is of class {type(model).__name__}, which is no model: give what "
            "AutoModelForCausalLM.from_pretrained returns, or a name to from_pretrained"
        )
    for name, module in model.named_modules():
        _check_module(name or type(module).__name__, module)
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise BarberError(f"model lies on several devices, {', '.join(devices)}: load it onto one, such as the CPU")
    return model


def _check_module(name: str, module: nn.Module) -> None:
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and isinstance(module, peft.BaseTuner | peft.BaseTunerLayer):
        raise BarberError(f"model has an unmerged adapter in {name}: merge it first, by merge_and_unload()")
    if hasattr(module, "_orig_mod"):
        raise BarberError(f"model has a part that is compiled, {name}: give the model as it was before")
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        raise BarberError(
            f"model computes the weight of {name} on the way: make it a parameter first, by torch.nn.utils' "
            "prune.remove, remove_weight_norm or parametrize.remove_parametrizations"
        )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise BarberError(
            f"model holds no weights of {name}: it is offloaded or empty; load it whole, or give its directory to "
            "from_pretrained, which prunes it layer by layer"
        )
    if parameter.is_inference():
        raise BarberError(f"model was made inside torch.inference_mode(), {name} too: load it outside")
    kind = type(parameter)
    if f"{kind.__module__}.".startswith(FOREIGN):
        raise BarberError(f"model holds {name} as {kind.__name__}, packed or sharded: load it as plain tensors")


@contextmanager
def default_torch() -> Iterator[None]:
    """Context manager: torch computes as it does by default, whatever modes the caller has entered.

    Compiled modules run as they are written, since a replayed layer is not the one that was compiled.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in filter(torch.is_autocast_enabled, AUTOCASTS):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Context manager: give every module its training mode back afterwards, and every parameter its requires_grad."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, mode in gradients:
            parameter.requires_grad_(mode)


def keep_modes(method: "Method[Tool, Arguments, Result]") -> "Method[Tool, Arguments, Result]":
    """Decorate a method that works on `self.model` by `default_torch` and `same_modes`."""

    @wraps(method)
    def inside(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with default_torch(), same_modes(causal_lm(self.model)):
            return method(self, *args, **kwargs)

    return inside
