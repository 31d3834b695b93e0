"""Which device a run works on, in which dtype, with how exact matrix products."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..base.devices import accelerator, accelerator_count, fast_precision, has_float64
from ..base.errors import BarberError
from ..base.launcher import local_rank

CPU = torch.device("cpu")


def product_precision(precision: str, device: torch.device, routed: bool = False) -> str:
    """Return the precision of float32 products; `auto` is what the device has units for, see `fast_precision`.

    On a CPU, `auto` is float32 for models with `routed` experts: an expert gets another number of tokens in each
    window, and oneDNN compiles a bfloat16 kernel for each number, which takes longer than it saves.
    """
    if precision != "auto":
        return precision
    return "highest" if routed and device.type == "cpu" else fast_precision(device)


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Round the factors of float32 matrix products inside the block as `torch.set_float32_matmul_precision` says.

    Products are summed in float32 in any case. Float64 computations, such as sums over samples, do not change.
    `precision` is highest (float32), high (TF32, or three bfloat16 products) or medium (bfloat16).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with attention_products(precision):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def attention_products(precision: str) -> AbstractContextManager[Any]:
    """Return the context that rounds what torch's setting does not reach; `medium` has one."""
    return RoundedAttention() if precision == "medium" else nullcontext()


def recomputing_contexts(precision: str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what `torch.utils.checkpoint` enters in a forward pass, and where a backward pass computes it again.

    A backward pass runs outside of the modes of the forward pass, so the second one rounds as `matrix_products` does.
    """
    return nullcontext(), attention_products(precision)


class RoundedAttention(TorchFunctionMode):
    """Inside, attention of float32 tensors on a CPU multiplies in bfloat16: its kernel does not ask torch's setting.

    Scores and the softmax stay float32; queries, keys, values and outputs are rounded.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a torch function, attention with rounded tensors."""
        kwargs = kwargs or {}
        if function is not functional.scaled_dot_product_attention or not _float32_on_cpu(args[:3]):
            return function(*args, **kwargs)
        rounded = [tensor.to(torch.bfloat16) for tensor in args[:3]]
        return function(*rounded, *args[3:], **kwargs).to(torch.float32)


def _float32_on_cpu(tensors: tuple[Any, ...]) -> bool:
    """Return whether query, key and value are all there, in float32 and on the CPU."""
    return len(tensors) == 3 and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


class SeveralDevicesError(BarberError):
    """Several devices are named where one is expected."""


def device_names(device: str) -> list[str]:
    """Return the devices that a comma-separated list names; `all` are all accelerators of this machine."""
    if device != "all":
        return device.split(",")
    kind = accelerator()
    if kind is None:
        raise BarberError("device 'all' finds no accelerator on this machine: give cpu")
    return [f"{kind.type}:{number}" for number in range(accelerator_count())]


def choose_device(device: str) -> torch.device:
    """Return a device; `auto` is the machine's accelerator if it has float64, else the CPU.

    Under a launcher of several processes, `auto` is the accelerator of this process.
    """
    if device == "auto":
        kind = accelerator()
        return CPU if kind is None else _own_device(kind)
    names = device_names(device)
    if len(names) > 1:
        raise SeveralDevicesError(
            f"device {device!r} names {len(names)} devices, this works on one: give one of {', '.join(names)}"
        )
    try:
        chosen = torch.device(names[0])
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BarberError(f"device {device!r} is not at hand: {str(error).splitlines()[0]}") from None
    return chosen


def summing_device(device: str) -> torch.device:
    """Return a device that can sum over samples; a `BarberError` names one that cannot."""
    chosen = choose_device(device)
    if not has_float64(chosen):
        raise BarberError(f"device {device!r} has no float64, in which samples are summed: give cpu")
    return chosen


def working_dtype(dtype: str, device: torch.device, on_gpu: str = "auto") -> str:
    """Return the dtype in which a model is loaded; `auto` is float32 on a CPU, else `on_gpu` (auto: as stored)."""
    if dtype != "auto":
        return dtype
    return "float32" if device.type == "cpu" else on_gpu


def _own_device(kind: torch.device) -> torch.device:
    number, count, own = 0, accelerator_count(), kind
    rank = local_rank()
    if rank is not None:
        number, own = rank, torch.device(kind.type, min(rank, count - 1))
    if not has_float64(own):
        return CPU
    if number >= count:
        raise BarberError(
            f"device 'auto' finds no GPU for process {number} of this machine, which has {count}: "
            f"start {count} processes, or give cpu"
        )
    return own
