"""Symmetric integer quantization under a keep mask: format, scales, round-to-nearest, packed codes. Torch only."""

from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 1 / 40  # between the shares of max|w| / highest code that are tried as a scale
STEPS = {2: 38, 4: 25, 8: 25}  # shares by bits: 1, 0.975, ..., 0.075 for 2, and down to 0.4


@dataclass(frozen=True)
class IntegerFormat:
    """How quantized weights are stored.

    Attributes:
        bits: of a code, 2, 4 or 8; codes lie in [-2^(bits-1), 2^(bits-1) - 1].
        group_size: consecutive weights along the input dimension that share a scale; None for a whole output row.
        dtype: of scales and dequantized weights.
    """

    bits: int
    group_size: int | None
    dtype: torch.dtype

    @property
    def highest(self) -> int:
        """The largest code; the smallest is -highest - 1."""
        return int(2 ** (self.bits - 1)) - 1


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: codes, (out, in) int8, zero where pruned; scales > 0, (out, groups)."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Codes times the scales of their groups, (out, in) in the scales' dtype."""
        return scaled(self.codes.unflatten(1, (self.scale.shape[1], -1)), self.scale[..., None]).flatten(1)


def round_to_nearest(weight: Tensor, keep: Tensor, form: IntegerFormat) -> Quantized:
    """Each kept weight of W, (out, in) float32 or float64, at the nearest code of its group's grid."""
    grouped = torch.where(keep, weight, 0).reshape(-1, form.group_size or weight.shape[1])
    scale = choose_scale(grouped, form)
    return Quantized(nearest_codes(grouped, scale, form).reshape(weight.shape), scale.reshape(len(weight), -1))


def choose_scale(weight: Tensor, form: IntegerFormat) -> Tensor:
    """The scale of each row by least squared error: the best share of max|w| / highest code, out of `STEPS`.

    Scales are rounded to the format's dtype before they are tried.

    Args:
        weight: (rows, width), zero where pruned, so that pruned weights do not count.

    Returns:
        (rows, 1) > 0 in the format's dtype; 1 where all weights are zero, or too small for that dtype.
    """
    largest = weight.abs().amax(1, keepdim=True) / form.highest
    best, least = torch.ones_like(largest, dtype=form.dtype), torch.full_like(largest, torch.inf)
    for step in range(STEPS[form.bits]):
        scale = (largest * (1 - step * STEP)).to(form.dtype)
        scale[scale == 0] = 1
        error = (weight - scaled(nearest_codes(weight, scale, form), scale)).square_().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def nearest_codes(weight: Tensor, scale: Tensor, form: IntegerFormat) -> Tensor:
    """The nearest codes, int8; halves go to the even one."""
    return (weight / scale).round_().clamp_(-form.highest - 1, form.highest).to(torch.int8)


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """Dequantized codes in the scale's dtype."""
    return codes.to(scale.dtype) * scale


def unpack_codes(packed: Tensor, bits: int, width: int) -> Tensor:
    """The codes in `packed`, (out, words) int32: row by row, lowest bits first, 2^(bits-1) added; (out, width) int8."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return (codes.flatten(1)[:, :width] - 2 ** (bits - 1)).to(torch.int8)
