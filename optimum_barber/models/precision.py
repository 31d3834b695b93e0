"""How exact float32 matrix products are: torch's setting, for the length of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
