"""Which device a run works on, in which dtype, with how exact matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..base.errors import BarberError
from ..base.rank_group import own_gpu


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Inside, float32 matrix products round their factors as `torch.set_float32_matmul_precision` says.

    Sums are float32 in any case. What is computed in float64, such as sums over samples, is not touched.

    Args:
        precision: highest (float32), high (TF32, or three bfloat16 products), medium (bfloat16).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; under a launcher of several processes the GPU of this one.

    Raises:
        BarberError: there is no such device.
    """
    if device == "auto":
        return own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BarberError(f"device {device!r} is not at hand: {str(error).splitlines()[0]}") from None
    return chosen


def working_dtype(dtype: str, device: torch.device) -> str:
    """The dtype that a model is loaded in to be run: `auto` is float32 on a CPU, else the model's own."""
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype
