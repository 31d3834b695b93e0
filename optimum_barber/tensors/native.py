"""Kernels in C++ for the CPU, compiled once on the user's machine; torch does the same, bit for bit, without them.

The environment variable OPTIMUM_BARBER_KERNELS=0 turns them off. So does a machine without a C++ compiler.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
SWITCH = "OPTIMUM_BARBER_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC")
SECONDS = 60  # that a compiler may take
PIECE = 2**16  # numbers that are worth a thread
Work = Callable[[slice], object]


def exchanged(
    values: Tensor, keep: Tensor, slopes: Tensor, gram: Tensor, most: int | None, group: int | None
) -> Tensor | None:
    """Return the keep mask after up to `most` exchanges in each row; None where there is no kernel for these tensors.

    Args:
        values: v, (rows, width) float32.
        keep: m, (rows, width) bool.
        slopes: c, or turn * c within groups, (rows, width).
        gram: G, (width, width).
        most: exchanges a row; None for a thorough search, which has no kernel.
        group: M of groups, whose columns lie by place; None for exchanges between any two places.
    """
    library = _library_for(values, slopes, gram)
    if library is None or most is None:
        return None
    rows, width = values.shape
    values, gram = values.contiguous(), gram.contiguous()
    keep = keep.clone(memory_format=torch.contiguous_format)
    slopes = slopes.clone(memory_format=torch.contiguous_format)

    def work(some: slice) -> None:
        pointers = [tensor[some].data_ptr() for tensor in (values, keep, slopes)]
        sizes = [some.stop - some.start, width]
        if group is None:
            library.exchange_free(*pointers, gram.data_ptr(), *sizes, most)
        else:
            library.exchange_groups(*pointers, gram.data_ptr(), *sizes, group, most)

    _in_threads(work, rows, least=1)
    return keep


def add_to_double(total: Tensor, part: Tensor) -> bool:
    """Add `part`, float32, to `total`, float64, both of one shape; False if there is no kernel for these tensors."""
    library = _library_for(part)
    if library is None or not part.is_contiguous() or not total.is_contiguous():
        return False
    to, one = total.view(-1), part.view(-1)

    def work(some: slice) -> None:
        library.add_to_double(to[some].data_ptr(), one[some].data_ptr(), some.stop - some.start)

    _in_threads(work, len(one), least=PIECE)
    return True


def _library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return None
    return _library()


def _in_threads(work: Work, count: int, least: int) -> None:
    """Do the work of `count` items, at least `least` a thread, in as many threads as torch has."""
    threads = max(min(torch.get_num_threads(), count // least), 1)
    if threads == 1:
        work(slice(0, count))
        return
    ends = [count * number // threads for number in range(threads + 1)]
    shares = [slice(first, last) for first, last in pairwise(ends)]
    list(_pool(threads).map(work, shares))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are turned off or cannot be compiled."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if os.environ.get(SWITCH) == "0" or compiler is None:
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("kernels cannot be compiled, torch computes instead: %s", error)
        return None


def _compiled(compiler: str) -> Path:
    """The file of the kernels, compiled for this machine unless it is there."""
    key = hashlib.sha256(SOURCE.read_bytes() + "\0".join([compiler, *OPTIONS, _processor()]).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "optimum_barber"
    library = directory / f"kernels-{key[:16]}.so"
    if not library.is_file():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            beside = Path(folder) / "kernels.so"
            command = [compiler, *OPTIONS, "-o", str(beside), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            beside.replace(library)
    return library


def _processor() -> str:
    """What the compiler may optimize for: the features of the processor, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform()
    features = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(features)))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.exchange_free.argtypes = [*[pointer] * 4, *[size] * 3]
    library.exchange_groups.argtypes = [*[pointer] * 4, *[size] * 4]
    library.add_to_double.argtypes = [pointer, pointer, size]
    for function in (library.exchange_free, library.exchange_groups, library.add_to_double):
        function.restype = None
    return library
