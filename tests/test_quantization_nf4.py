"""NF4 and FP4 are bitsandbytes', bit for bit: codes, scales, quantized scales and values."""

import math
from statistics import NormalDist

import bitsandbytes.functional as peer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.quantization import (
    CodebookTensor,
    dequantize,
    dequantize_fp4,
    dequantize_nf4,
    quantize_absmax,
    quantize_fp4,
    quantize_nf4,
)
from llmlab.quantization.nf4 import CODEBOOKS, codebook, dynamic_codebook

QUANTIZE = {"nf4": quantize_nf4, "fp4": quantize_fp4}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(kind, shape, name, seed):
    """Values that are hard to get right: what lies between two codes, zeros, denormals, outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "sparse":
        return x * (torch.rand(shape, generator=generator) < 0.1)
    if kind == "denormal":
        return x * 1e-41
    if kind == "small":
        return x * 3e-38
    if kind == "large":
        return x * 1e4
    if kind == "uneven":
        return x * 10.0 ** torch.randint(-6, 4, shape, generator=generator)
    if kind in ("ties", "near ties"):
        values = codebook(name).sort().values
        middles = (values[:-1] + values[1:]) / 2
        x = middles[torch.randint(15, shape, generator=generator)]
        if kind == "near ties":
            away = torch.randint(-1, 2, shape, generator=generator) * float("inf")
            x = torch.where(away == 0, x, torch.nextafter(x, away)).nan_to_num(nan=0.0)
        x.view(-1)[::32] = 1.0  # every block's largest
    return x


KINDS = ["normal", "zeros", "sparse", "denormal", "small", "large", "uneven", "ties", "near ties"]


def check(x, name, block_size, double):
    codes, state = peer.quantize_4bit(x, blocksize=block_size, quant_type=name, compress_statistics=double)
    ours = QUANTIZE[name](x, block_size, double)
    assert torch.equal(ours.packed, codes.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.absmax_scale, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
    theirs, values = reference_values(codes, state, x.shape), dequantize(ours)
    # their vector instructions have no denormals in bf16
    flushed = (theirs == 0) & (values.abs() < torch.finfo(x.dtype).tiny) & (x.dtype == torch.bfloat16)
    assert torch.equal(values.masked_fill(flushed, 0), theirs)
    assert ours.num_bytes == sum(t.numel() * t.element_size() for t in ours.parts().values())
    back = CodebookTensor.from_parts(ours.parts(), ours.description())
    assert torch.equal(dequantize(back), dequantize(ours))
    return ours


def reference_values(codes, state, shape):
    """bitsandbytes' own values where its blocks divide a row; elsewhere its scales times its codebook.

    Its AVX-512 code takes other blocks' scales for rows of, say, 48 values in blocks of 32 (0.50.2), and odd rows are compiled.
    """
    if shape[-1] % state.blocksize == 0:
        return peer.dequantize_4bit(codes, state).view(shape)
    absmax = peer.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    both = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), 1).flatten()[: math.prod(shape)]
    values = state.code[both.int()] * absmax.repeat_interleave(state.blocksize)[: len(both)]
    return values.to(state.dtype).view(shape)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_codebooks_are_theirs(name):
    assert torch.equal(codebook(name), peer.get_4bit_type(name, device="cpu"))
    assert torch.equal(dynamic_codebook(), peer.create_dynamic_map())


def test_nf4_is_made_of_normal_quantiles():
    """Evenly spaced quantiles of N(0, 1), 8 on the negative side and 9 on the positive, that share the zero; over the largest."""
    offset = 0.9677083
    positive = [NormalDist().inv_cdf(0.5 + (offset - 0.5) * i / 8) for i in range(9)]
    negative = [-NormalDist().inv_cdf(0.5 + (offset - 0.5) * i / 7) for i in range(7, 0, -1)]
    expected = torch.tensor(negative + positive) / max(positive)
    assert torch.allclose(codebook("nf4"), expected, atol=1e-6)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit(name, dtype, kind):
    for seed, shape in enumerate([(64,), (1,), (130,), (7, 9), (100, 334), (3, 5, 8), (3, 128)]):
        for block_size, double in ((64, True), (64, False), (32, True), (4096, False)):
            check(inputs(kind, shape, name, seed).to(dtype), name, block_size, double)


@given(
    st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 400), st.sampled_from([32, 64, 128, 256]), st.booleans(),
    st.sampled_from(sorted(CODEBOOKS)), st.sampled_from(DTYPES), st.sampled_from(KINDS),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_bit_for_bit_on_any_shape(seed, rows, columns, block_size, double, name, dtype, kind):
    check(inputs(kind, (rows, columns), name, seed).to(dtype), name, block_size, double)


def test_scales_that_lie_between_two_codes():
    """The second quantization where scales, less their mean, stand at the edges of its table, for every code."""
    values = dynamic_codebook()
    middles = (values[:-1] + values[1:]) / 2
    x = torch.zeros(64 * 510 * 2)
    scales = torch.cat((3 + middles, 3 + torch.nextafter(middles, torch.tensor(9.0)), 3 - middles, 3 - middles))
    x[::64] = scales[: len(x) // 64]
    check(x, "nf4", 64, True)


def test_bits_a_value():
    """4 bits, and 32 of a scale for 64; or 8 and 32 for 64 * 256, which is 0.127, and one offset."""
    x = torch.randn(1024, 1024)
    count = x.numel()
    assert quantize_nf4(x, 64, False).num_bytes * 8 == count * (4 + 32 / 64)
    assert (quantize_nf4(x, 64, True).num_bytes - 4) * 8 == count * (4 + 0.126953125)


def test_a_code_is_the_nearest_value():
    """Brute force over 16 values, in fp64; a tie may fall either way by a rounding."""
    for name, quantize in QUANTIZE.items():
        x = torch.randn(20, 64)
        relative = x.double() / x.double().abs().amax(1, keepdim=True)
        distances = (relative[..., None] - codebook(name).double()).abs()
        chosen = distances.gather(-1, quantize(x, 64, False).codes.long()[..., None]).squeeze(-1)
        assert bool((chosen <= distances.min(-1).values + 1e-7).all())


def test_values_on_the_codebook_stay():
    x = codebook("nf4").repeat(8).view(2, 64) * 3
    assert torch.allclose(dequantize(quantize_nf4(x, 64, False)), x, rtol=1e-6)


def test_other_dtypes_and_blocks():
    """fp64 goes through fp32; blocks may have any length, though bitsandbytes has powers of two."""
    x = torch.randn(10, 21, dtype=torch.float64)
    q = quantize_nf4(x, 10)
    assert dequantize(q).dtype == torch.float64
    assert torch.equal(q.packed, quantize_nf4(x.float(), 10).packed)
    assert len(q.absmax) == 21


def test_wrong_arguments_are_refused():
    x = torch.randn(4, 64)
    with pytest.raises(ValueError, match="block_size: expected a whole number of at least 1"):
        quantize_nf4(x, 0)
    with pytest.raises(TypeError, match="double_quantization: expected a bool"):
        quantize_nf4(x, 64, 1)
    with pytest.raises(ValueError, match="x: expected finite values"):
        quantize_fp4(x / 0)
    with pytest.raises(ValueError, match="x: expected values, got the empty shape"):
        quantize_nf4(x[:0])
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        quantize_nf4(x.int())
    with pytest.raises(TypeError, match="quantized: expected a tensor in nf4, got fp4"):
        dequantize_nf4(quantize_fp4(x))
    with pytest.raises(TypeError, match="quantized: expected a tensor in fp4, got QuantizedTensor"):
        dequantize_fp4(quantize_absmax(x))
