"""GPTQ and coordinate descent under a keep mask: what rounding loses, other kept weights make up for. Torch only."""

import torch
from torch import Tensor

from .quantize import IntegerFormat, Quantized, choose_scale, nearest_codes, scaled


def gptq(weight: Tensor, keep: Tensor, factor: Tensor, form: IntegerFormat, block_size: int = 128) -> Quantized:
    """GPTQ (arXiv 2210.17323): column by column, quantize, and let the columns behind make up for the error.

    With U the upper Cholesky factor of (H + lambda I)^-1 and q_j the column's dequantized codes, zero where
    pruned, every column k > j becomes w_k - (w_j - q_j) U_jk / U_jj. What reaches a pruned weight on the way is
    an error in its own column and goes on from there to the kept weights behind, so that nothing is lost
    and pruned weights end as exact zeros. A group's scale is chosen when its first column is reached.

    Args:
        weight: W, (out, in), float32 or float64; what is computed is computed in that.
        factor: U, (in, in), in the weight's dtype.
        block_size: columns after which those behind are brought up to date; changes the speed only.
    """
    remaining, codes = torch.where(keep, weight, 0), torch.empty_like(weight, dtype=torch.int8)
    group_size = form.group_size or weight.shape[1]
    scales: list[Tensor] = []
    for start in range(0, weight.shape[1], group_size):
        group = slice(start, start + group_size)
        scales.append(choose_scale(torch.where(keep[:, group], remaining[:, group], 0), form))
        for first in range(start, group.stop, block_size):
            columns = slice(first, min(first + block_size, group.stop))
            block = remaining[:, columns], keep[:, columns], codes[:, columns]
            errors = _quantize_columns(*block, factor[columns, columns], scales[-1], form)
            remaining[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return Quantized(codes, torch.cat(scales, 1))


def _quantize_columns(
    weight: Tensor, keep: Tensor, codes: Tensor, factor: Tensor, scale: Tensor, form: IntegerFormat
) -> Tensor:
    """Fill one block of `codes`, bringing `weight` up to date; the scaled errors, (out, columns), for those behind."""
    errors = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        one = slice(column, column + 1)
        codes[:, one] = nearest_codes(weight[:, one] * keep[:, one], scale, form)
        errors[:, one] = (weight[:, one] - scaled(codes[:, one], scale)) / factor[column, column]
        weight[:, column + 1 :].addr_(errors[:, column], factor[column, column + 1 :], alpha=-1)
    return errors


def descend(
    weight: Tensor,
    keep: Tensor,
    start: Quantized,
    gram: Tensor,
    form: IntegerFormat,
    sweeps: int,
    block_size: int = 128,
) -> Quantized:
    """Coordinate descent on tr((W - Q) H (W - Q)^T), which never rises (QuantEase, arXiv 2309.01885).

    In every sweep each kept weight in turn takes the code that is best given all others: with R = (W - Q) H,
    the one nearest to q_j + R_j / H_jj. Scales and pruned weights stay. This is where kept weights in front of
    a pruned one make up for it too, which GPTQ's order of the columns rules out.

    Args:
        weight: W, (out, in), float32 or float64; what is computed is computed in that.
        gram: H, (in, in), in the weight's dtype, its diagonal above zero.
        sweeps: over all columns, at least 0.
        block_size: columns after which all others are brought up to date; changes the speed only.
    """
    width = weight.shape[1]
    codes, values = start.codes.clone(), start.dequantize().to(weight.dtype)
    scale = start.scale.repeat_interleave(width // start.scale.shape[1], 1)
    residual = (weight - values) @ gram
    for first in [*range(0, width, block_size)] * sweeps:
        columns = slice(first, first + block_size)
        before, local = values[:, columns].clone(), residual[:, columns].clone()
        block = values[:, columns], codes[:, columns], keep[:, columns], scale[:, columns]
        _descend_columns(*block, local, gram[columns, columns], form)
        residual -= (values[:, columns] - before) @ gram[columns]
    return Quantized(codes, start.scale)


def _descend_columns(
    values: Tensor, codes: Tensor, keep: Tensor, scale: Tensor, residual: Tensor, gram: Tensor, form: IntegerFormat
) -> None:
    for column in range(values.shape[1]):
        one = slice(column, column + 1)
        value = values[:, one].clone()
        best = value + residual[:, one] / gram[column, column]
        tried = nearest_codes(best * keep[:, one], scale[:, one], form)
        better = (scaled(tried, scale[:, one]) - best).abs() < (value - best).abs()
        codes[:, one] = torch.where(better, tried, codes[:, one])
        values[:, one] = torch.where(better, scaled(tried, scale[:, one]), value)
        residual.addr_((values[:, one] - value).squeeze(1), gram[column], alpha=-1)
