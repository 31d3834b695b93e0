"""Memory and disk: what is free, what a process takes, and, with glibc, how freed buffers go back to the system."""

import ctypes
import gc
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHT_SIZED = 4 * 2**20  # bytes; activations of a window are smaller and stay in the heap, where reuse is free
HEAP_TOP = 16 * 2**20  # bytes; activations come and go there, and pages that went back would be faulted in every time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
WORTH_TRIMMING = 128 * 2**20  # bytes; pages that go back must be had again, which costs time


KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of torch's layer above it
KERNELS_KEPT = 64


class _Mallinfo(ctypes.Structure):  # of mallinfo2(3)
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def return_freed_buffers(bytes_from: int = WEIGHT_SIZED) -> None:
    """Have buffers of this size and above go back to the system as soon as they are freed, from now on.

    Left to itself, glibc serves ever larger buffers from its heap, where small long-lived ones, such as packed
    masks, pin what lies beneath them: the resident size then grows with every decoder layer. What is free at the heap's
    end stays there for reuse, up to `HEAP_TOP`. `MALLOC_MMAP_THRESHOLD_=4194304` and `MALLOC_TRIM_THRESHOLD_=16777216`
    in the environment do the same.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, bytes_from)
        mallopt(M_TRIM_THRESHOLD, HEAP_TOP)


def keep_few_kernels() -> None:
    """Have oneDNN keep the last kernels alone, unless the user says otherwise; it reads this at its first product.

    It compiles a kernel of a megabyte or more for every shape of a bfloat16 product, and keeps 1,024: each expert gets
    another number of tokens in every window. To compile one takes about a millisecond.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def trim() -> None:
    """Give back what is free now, garbage too."""
    gc.collect()
    heap.give_back()


class Heap:
    """The heap of this process, between whose buffers pages lie that are resident but free, too small for reuse.

    Attributes:
        settled: bytes resident beside the buffers in use, such as the interpreter's own, when last no page could go.
        level: bytes resident when this was last asked for, or fewer since.
    """

    settled: int = 0
    level: int = 0

    def give_back(self, from_bytes: int = 0) -> None:
        """Give back the pages that are free, if `from_bytes` or more have gathered since the last time.

        The C library walks through all free buffers to tell what they take, so it is asked only where the process has
        grown by as much.
        """
        malloc_trim = getattr(_libc(), "malloc_trim", None)
        if malloc_trim is None:
            return
        now = resident()
        self.level = min(self.level, now)
        if now - self.level < from_bytes:
            return
        beside = _beside_buffers()
        self.settled = min(self.settled, beside)
        if beside - self.settled >= from_bytes:
            malloc_trim(0)
            self.settled = _beside_buffers()
        self.level = resident()


heap = Heap()


def _beside_buffers() -> int:
    """Resident bytes that no buffer in use accounts for; 0 where the C library does not tell."""
    mallinfo = getattr(_libc(), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return resident() - int(info.uordblks) - int(info.hblkhd)


def resident() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def free_memory(device: "torch.device | None" = None) -> int | None:
    """Bytes that this process may still take, of a device or else of the host; None where nothing tells."""
    if device is not None and device.type != "cpu":
        from .devices import free_memory as free_on

        return free_on(device)
    available = _numbers(Path("/proc/meminfo")).get("MemAvailable:")
    if available is None:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        taken = _numbers(group / "memory.stat")["anon"]
    except (OSError, ValueError, KeyError):  # no group, or one without a limit
        return 1024 * available
    return min(1024 * available, limit - taken)


def _numbers(table: Path) -> dict[str, int]:
    """The first number of each line of a table of the kernel by its first word; empty where there is no table."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    rows = [line.split() for line in lines]
    return {row[0]: int(row[1]) for row in rows}


def free_disk(directory: Path) -> int:
    """Bytes that the file system has left where `directory` is, or will be."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def peak_memory() -> int:
    """Bytes: the peak of the accelerator's allocator where one is in use, else the process's largest resident size."""
    import resource

    from . import devices

    peak = devices.peak_memory()
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew: on accelerators, and where the system allows it for a process (Linux)."""
    from . import devices

    devices.reset_peak_memory()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")
