"""Round-to-nearest and GPTQ under a mask: against loops, and what holds for every mask, width and group."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber.prune.producers.sparsegpt import inverse_factor
from optimum_barber.tensors.gptq import descend, gptq
from optimum_barber.tensors.quantize import IntegerFormat, choose_scale, round_to_nearest, unpack_codes

SHAPE = (6, 24)
FORMATS = [(bits, group) for bits in (2, 4, 8) for group in (None, 12, 8, 1)]


def problem(shape=SHAPE, seed=0, sparsity=0.5, tokens=200, dtype=torch.float64):
    """Weights, a random keep mask, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[1]
    mix = torch.randn(width, width, generator=generator, dtype=dtype) / torch.arange(1, width + 1, dtype=dtype)[:, None]
    inputs = torch.randn(tokens, width, generator=generator, dtype=dtype) @ mix
    inputs = inputs + 0.05 * torch.randn(tokens, width, generator=generator, dtype=dtype)
    keep = torch.rand(shape, generator=generator) >= sparsity
    return torch.randn(shape, generator=generator, dtype=dtype) * keep, keep, inputs.t() @ inputs


def slow_value(weight, scale, bits):
    """(code, dequantized value) of one weight."""
    code = min(max(round(weight / float(scale)), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    return code, float(np.float32(code) * scale)


def slow_scale(kept, bits):
    """The best of 25 scales, of 38 for 2 bits, for a list of kept weights, stored in float32."""
    largest = max((abs(weight) for weight in kept), default=0.0) / (2 ** (bits - 1) - 1)
    tried = [np.float32(largest * (1 - step / 40)) or np.float32(1) for step in range(38 if bits == 2 else 25)]
    return min(tried, key=lambda scale: sum((weight - slow_value(weight, scale, bits)[1]) ** 2 for weight in kept))


def slow_round(weight, keep, bits, group):
    """Codes and scales by loops over rows, groups and weights."""
    codes, scales = [], []
    for row, kept in zip(weight.tolist(), keep.tolist(), strict=True):
        codes.append([0] * len(row))
        scales.append([])
        for start in range(0, len(row), group):
            places = [j for j in range(start, start + group) if kept[j]]
            scales[-1].append(slow_scale([row[j] for j in places], bits))
            for j in places:
                codes[-1][j] = slow_value(row[j], scales[-1][-1], bits)[0]
    return codes, scales


def slow_gptq(weight, keep, gram, damping, bits, group):
    """Optimal brain quantization in the order of the columns: the inverse of what is left, anew for every column."""
    width = weight.shape[1]
    hessian = gram.numpy() + damping * gram.numpy().diagonal().mean() * np.eye(width)
    left, codes = weight.numpy().copy(), np.zeros(weight.shape, dtype=int)
    scales = [[] for _ in left]
    for column in range(width):
        inverse = np.linalg.inv(hessian[column:, column:])
        for i, row in enumerate(left):
            if column % group == 0:
                scales[i].append(slow_scale([row[j] for j in range(column, column + group) if keep[i, j]], bits))
            code, value = slow_value(row[column], scales[i][-1], bits) if keep[i, column] else (0, 0.0)
            codes[i, column] = code
            error = (row[column] - value) / inverse[0, 0]
            for k in range(column + 1, width):
                row[k] -= error * inverse[0, k - column]
    return codes.tolist(), scales


def slow_descent(weight, codes, scale, keep, gram, sweeps, bits):
    """Every kept weight in turn at the best of all codes, by the whole error of its row."""
    weight, codes, gram = weight.numpy(), codes.numpy().astype(int), gram.numpy()
    scale = np.repeat(scale.numpy(), weight.shape[1] // scale.shape[1], 1)

    def error(row, i):
        lost = weight[i] - (row.astype(np.float32) * scale[i]).astype(float)
        return lost @ gram @ lost

    for _, j, i in np.ndindex(sweeps, weight.shape[1], weight.shape[0]):
        if keep[i, j]:
            choices = [codes[i].copy() for _ in range(2**bits)]
            for code, row in zip(range(-(2 ** (bits - 1)), 2 ** (bits - 1)), choices, strict=True):
                row[j] = code
            codes[i] = min(choices, key=lambda row: error(row, i))
    return codes.tolist()


def same(quantized, oracle):
    codes, scales = oracle
    return quantized.codes.tolist() == codes and torch.equal(quantized.scale, torch.tensor(np.array(scales)))


def reconstruction_error(weight, quantized, gram):
    """tr((W - Q) H (W - Q)^T)."""
    lost = weight - quantized.dequantize()
    return ((lost @ gram) * lost).sum().item()


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_round_to_nearest_equals_its_oracle(bits, group, sparsity):
    weight, keep, _ = problem(sparsity=sparsity)
    quantized = round_to_nearest(weight, keep, IntegerFormat(bits, group, torch.float32))
    assert same(quantized, slow_round(weight, keep, bits, group or SHAPE[1]))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("block_size", [5, 128])
def test_gptq_equals_its_oracle_whatever_the_block(bits, group, sparsity, block_size):
    weight, keep, gram = problem(sparsity=sparsity)
    factor = inverse_factor(gram, 0.01, "up")
    quantized = gptq(weight, keep, factor, IntegerFormat(bits, group, torch.float32), block_size)
    assert same(quantized, slow_gptq(weight, keep, gram, 0.01, bits, group or SHAPE[1]))


@pytest.mark.parametrize(("bits", "group", "block_size"), [(4, None, 128), (4, 8, 5), (8, 12, 7)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_descent_equals_its_oracle_whatever_the_block(bits, group, block_size, sparsity):
    weight, keep, gram = problem((3, 24), sparsity=sparsity)
    form = IntegerFormat(bits, group, torch.float32)
    start = round_to_nearest(weight, keep, form)
    result = descend(weight, keep, start, gram, form, 2, block_size)
    assert result.codes.tolist() == slow_descent(weight, start.codes, start.scale, keep, gram, 2, bits)
    assert not torch.equal(result.codes, start.codes)


@given(
    seed=st.integers(0, 2**31), bits=st.sampled_from([4, 8]), group=st.sampled_from([None, 1, 3, 8, 24]),
    sparsity=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    method=st.sampled_from(["gptq", "descent", "round-to-nearest"]),
)  # fmt: skip
def test_pruned_weights_are_zero_and_codes_and_scales_legal(seed, bits, group, sparsity, dtype, method):
    weight, keep, gram = problem(seed=seed, sparsity=sparsity, dtype=torch.float32)
    form = IntegerFormat(bits, group, dtype)
    if method == "gptq":
        quantized = gptq(weight, keep, inverse_factor(gram, 0.01, "up"), form, block_size=7)
    elif method == "descent":
        quantized = descend(weight, keep, round_to_nearest(weight, keep, form), gram, form, 2)
    else:
        quantized = round_to_nearest(weight, keep, form)
    assert quantized.codes.dtype == torch.int8
    assert not quantized.codes[~keep].any() and not quantized.dequantize()[~keep].any()
    assert -(2 ** (bits - 1)) <= int(quantized.codes.min()) <= int(quantized.codes.max()) < 2 ** (bits - 1)
    assert quantized.scale.dtype == quantized.dequantize().dtype == dtype
    assert quantized.scale.shape == (SHAPE[0], SHAPE[1] // (group or SHAPE[1]))
    assert torch.isfinite(quantized.scale).all() and (quantized.scale > 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_rebuilds_the_outputs_better_than_rounding(bits, group, sparsity, seed):
    weight, keep, gram = problem((16, 64), seed, sparsity, tokens=400, dtype=torch.float32)
    form = IntegerFormat(bits, group, torch.float32)
    first = gptq(weight, keep, inverse_factor(gram, 0.01, "up"), form)
    improved = descend(weight, keep, first, gram, form, 2)
    assert (
        reconstruction_error(weight, improved, gram)
        < reconstruction_error(weight, first, gram)
        < reconstruction_error(weight, round_to_nearest(weight, keep, form), gram)
    )


@given(
    seed=st.integers(0, 2**31), bits=st.sampled_from([4, 8]), sparsity=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), sweeps=st.integers(0, 3),
)  # fmt: skip
def test_descent_never_raises_the_error(seed, bits, sparsity, dtype, sweeps):
    weight, keep, gram = problem(seed=seed, sparsity=sparsity)
    form = IntegerFormat(bits, 8, dtype)
    start = round_to_nearest(weight, keep, form)
    result = descend(weight, keep, start, gram, form, sweeps)
    before = reconstruction_error(weight, start, gram)
    assert reconstruction_error(weight, result, gram) <= before * (1 + 1e-12)


def test_what_does_not_correlate_is_only_rounded():
    weight, keep, _ = problem()
    form = IntegerFormat(4, 8, torch.float32)
    independent = gptq(weight, keep, inverse_factor(torch.eye(24, dtype=torch.float64), 0.01, "up"), form)
    rounded = round_to_nearest(weight, keep, form)
    assert torch.equal(independent.codes, rounded.codes) and torch.equal(independent.scale, rounded.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_empty_and_vanishing_groups_have_a_legal_scale(dtype):
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-44]])
    assert choose_scale(weight, IntegerFormat(8, 2, dtype)).tolist() == [[1], [1]]


def test_an_outlier_is_clipped_where_that_costs_less():
    weight = torch.tensor([[8.0, *[2.6] * 60]])
    scale = choose_scale(weight, IntegerFormat(4, None, torch.float32)).item()
    assert scale < 8 / 7


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [32, 33, 40, 5])
def test_packed_codes_are_read_as_the_library_writes_them(bits, width):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, width), generator=generator, dtype=torch.int8)
    assert torch.equal(unpack_codes(pack_to_int32(codes, bits), bits, width), codes)
