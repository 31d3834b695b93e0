"""Weights in another dtype: cast, after a check that it can hold them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base.errors import BarberError


def extremes(weight: Tensor) -> Tensor:
    """Return the lowest and the highest value, (2,); NaN where any value is."""
    if weight.dtype.itemsize == 1 and weight.is_floating_point():
        weight = weight.half()  # exact; torch compares no fewer bits
    return torch.stack(weight.detach().aminmax()) if weight.numel() else torch.zeros(2)


def check_range(name: str, ends: Tensor, dtype: torch.dtype) -> None:
    """Refuse a weight with a finite value, one of its `extremes`, that `dtype` turns into an infinite one."""
    for end in ends.cpu():
        if end.isfinite() and not end.to(dtype).float().isfinite():
            limit = f"{str(dtype).removeprefix('torch.')}, which ends at {torch.finfo(dtype).max:.7g}"
            raise BarberError(f"weight {name} holds {end.item():.7g}, beyond {limit}: take a wider dtype")


def check_dtype(model: nn.Module, dtype: str) -> None:
    """Refuse a dtype that cannot hold a parameter of the model; see `check_range`."""
    target = getattr(torch, dtype)
    for name, parameter in model.named_parameters():
        if parameter.dtype != target and not parameter.is_meta:
            check_range(name, extremes(parameter), target)


def cast_parameters(model: nn.Module, dtype: str) -> None:
    """Cast the parameters; buffers, such as rotary frequencies, keep their precision. `auto` changes nothing.

    Raises:
        BarberError: a value is beyond the dtype; nothing was cast.
    """
    if dtype == "auto":
        return
    check_dtype(model, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def parameter_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter, which a model may keep of several."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def restore_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast every parameter to the dtype that `dtypes` names.

    Raises:
        BarberError: a value is beyond the dtype; nothing was cast.
    """
    for name, parameter in model.named_parameters():
        check_range(name, extremes(parameter), dtypes[name])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
