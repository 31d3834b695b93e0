"""Allocations: functions that share the sparsity out over the blocks of a model, out of a look at the dense one."""

from . import measured, owl  # noqa: F401  registered on import
from .base import ALLOCATIONS, AllocationFunction, Budget, allocation, share_out

__all__ = ["ALLOCATIONS", "AllocationFunction", "Budget", "allocation", "share_out"]
