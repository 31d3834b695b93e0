"""Which device a run works on, in which dtype, with how exact matrix products."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..base.errors import BarberError


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Round the factors of float32 matrix products inside the block as `torch.set_float32_matmul_precision` says.

    Products are summed in float32 in any case. Float64 computations, such as sums over samples, do not change.
    `precision` is highest (float32), high (TF32, or three bfloat16 products) or medium (bfloat16).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_device(device: str) -> torch.device:
    """Return a device; `auto` is CUDA where there is one, under a launcher of several processes the GPU of this one."""
    if device == "auto":
        return _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BarberError(f"device {device!r} is not at hand: {str(error).splitlines()[0]}") from None
    return chosen


def working_dtype(dtype: str, device: torch.device, on_gpu: str = "auto") -> str:
    """Return the dtype in which a model is loaded; `auto` is float32 on a CPU, else `on_gpu` (auto: as stored)."""
    if dtype != "auto":
        return dtype
    return "float32" if device.type == "cpu" else on_gpu


def _own_gpu() -> torch.device:
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise BarberError(
            f"device 'auto' finds no GPU for process {number} of this machine, which has {count}: "
            f"start {count} processes, or give cpu"
        )
    return torch.device("cuda", number)
