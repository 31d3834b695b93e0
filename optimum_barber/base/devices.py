"""Devices beside the CPU: which there are, their memory, their queues. Only this file asks torch's modules of devices.

A device is known by what torch's module of its type (`torch.cuda`, `torch.xpu`) offers. What a module lacks is left
out: memory is not told, copies are not made beside the work.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

COLLECTIVES = {"cuda": "nccl", "xpu": "xccl"}  # device type -> backend of process groups between such devices

CPU_UNITS = ("amx_bf16", "avx512_bf16")  # of bfloat16 products, as torch names what a CPU can do
ONEDNN_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # what oneDNN, which computes the products, may use of it
TF32_SINCE = (8, 0)  # CUDA compute capability

FLOAT64 = ("float64", "fp64")  # one of these names stands in the error of a device without it


def accelerator() -> torch.device | None:
    """Return the type of device that torch sees beside the CPU, without a number; None where there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def accelerator_count() -> int:
    """Count the accelerators of this machine."""
    return torch.accelerator.device_count()


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64."""
    try:
        return (torch.ones(1, device=device).to(torch.float64) + 1).dtype == torch.float64
    except (RuntimeError, TypeError) as error:
        if any(word in str(error) for word in FLOAT64):
            return False
        raise


def fast_precision(device: torch.device) -> str:
    """Return the precision of float32 products, as torch names it, for which a device has units of their own.

    `high` is TF32 on NVIDIA GPUs since compute capability 8.0, `medium` bfloat16 on CPUs with AMX or AVX512-BF16;
    `highest` is float32, everywhere else.
    """
    if device.type == "cuda" and torch.version.hip is None:
        return "high" if torch.cuda.get_device_capability(device) >= TF32_SINCE else "highest"
    return "medium" if device.type == "cpu" and _cpu_multiplies_bfloat16() else "highest"


def _cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has units for bfloat16 products, and oneDNN may use them."""
    if not torch.backends.mkldnn.is_available():
        return False
    for name in ONEDNN_CAPS:
        cap = os.environ.get(name, "").upper()
        if cap and cap not in ("ALL", "DEFAULT") and not re.match("AVX512_CORE_(BF|FP|AMX)|AVX10", cap):
            return False
    tell: Any = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch do not tell
    capabilities = tell()
    return any(capabilities.get(unit) for unit in CPU_UNITS)


def number_of(device: torch.device) -> int:
    """Return the index of a device; without one in its name, that of the current device of its type."""
    return int(_module(device).current_device()) if device.index is None else device.index


def make_current(device: torch.device) -> None:
    """Make a device the current one of its type."""
    _module(device).set_device(number_of(device))


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all its work; at once on the CPU."""
    wait = getattr(_module(device), "synchronize", None)
    if wait is not None:
        wait(*_arguments(device))


def empty_cache() -> None:
    """Give the memory that the accelerator's allocator keeps for reuse back to the device."""
    release = getattr(_used_module(), "empty_cache", None)
    if release is not None:
        release()


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a device has left; None where it does not tell, and on the CPU."""
    tell = getattr(_module(device), "mem_get_info", None)
    return int(tell(device)[0]) if tell is not None else None


def peak_memory() -> int | None:
    """Return the peak of the accelerator's allocator in bytes; None where none is in use, or its peak is not told."""
    tell = getattr(_used_module(), "max_memory_allocated", None)
    return int(tell()) if tell is not None else None


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew."""
    reset = getattr(_used_module(), "reset_peak_memory_stats", None)
    if reset is not None:
        reset()


@cache
def copy_stream(device: torch.device) -> Any:
    """Return a stream for copies beside the work of a device; None where it has one queue alone, and on the CPU."""
    stream = getattr(_module(device), "Stream", None)
    return stream(device) if stream is not None else None


def on_stream(stream: Any) -> Any:
    """Return a context in which a device's work goes to a stream of `copy_stream`."""
    return _module(stream.device).stream(stream)


def wait_for(event: Any, tensor: Tensor) -> None:
    """Let the tensor's device wait for an event of another stream, which made the tensor, before its next work."""
    working = _module(tensor.device).current_stream(tensor.device)
    working.wait_event(event)
    tensor.record_stream(working)


@contextmanager
def random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers inside the block, and restore the caller's afterwards."""
    kept = [device] if hasattr(_module(device), "get_rng_state_all") else []
    with torch.random.fork_rng(kept, device_type=device.type):
        torch.manual_seed(seed)
        yield


def _module(device: torch.device) -> Any:
    """Return torch's module of a device's type, such as `torch.cuda`; None for the CPU and for types without one."""
    return None if device.type in ("cpu", "meta") else torch.get_device_module(device)


def _used_module() -> Any:
    """Return torch's module of the accelerator, None before its first use."""
    device = accelerator()
    module = None if device is None else _module(device)
    return module if getattr(module, "is_initialized", bool)() else None


def _arguments(device: torch.device) -> tuple[torch.device, ...]:
    """Return the arguments by which torch's module of a device is asked about it: Apple's knows a single device."""
    return () if device.type == "mps" else (device,)
