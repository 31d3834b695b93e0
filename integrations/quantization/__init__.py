"""Quantization that keeps masks, by compressed-tensors."""

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    if name in ("MaskedQuantizer", "quantize_blocks", "quantize_model"):  # in 0.1.0 this package was a module
        raise ImportError(f"{__name__} is {__name__}.quantize since 0.2.0", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
