"""Rounding to integers and FP8, packing, and products in int8: against torch's own, closed forms and brute force."""

import importlib
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab.quantization as quantization
from llmlab.quantization import (
    QuantizedTensor,
    dequantize,
    grid,
    int8_product,
    llm_int8_product,
    outlier_columns,
    pack_bits,
    quantize_absmax,
    quantize_fp8,
    quantize_groups,
    quantize_zero_point,
    round_to,
    to_fp8,
    unpack_bits,
)
from llmlab.quantization.fp8 import largest
from llmlab.quantization.integer import values_on
from llmlab.quantization.outliers import product_by_chunks
from llmlab.quantization.packing import packed_length

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCHEMES = [(True, False), (False, False), (False, True)]  # symmetric, float minimum


def random_matrix(seed, rows, columns, dtype=torch.float32, heavy=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    if heavy:
        x = x * (1 + 20 * (torch.rand(rows, columns, generator=generator) < 0.02))
    return x.to(dtype)


def test_every_public_name_is_there():
    importlib.import_module("llmlab.quantization.models")  # a module of the same name would come before a function
    values = {name: getattr(quantization, name, None) for name in quantization.__all__}
    assert {name for name, value in values.items() if value is None or isinstance(value, types.ModuleType)} == set()
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        quantization.quantize  # noqa: B018


# ---------------------------------------------------------------- packing


@given(st.integers(1, 8), st.integers(0, 40), st.integers(1, 5), st.integers(0, 2**31))
def test_packing_and_back(bits, count, rows, seed):
    codes = torch.randint(1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_length(count, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_packed_row_is_one_number(bits):
    """Python's own big integers: code i counts 2^(b i), the lowest byte first."""
    codes = torch.randint(1 << bits, (3, 16), dtype=torch.uint8)
    for row, packed in zip(codes.tolist(), pack_bits(codes, bits).tolist(), strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(packed) == number.to_bytes(2 * bits, "little")


@pytest.mark.parametrize(
    ("bits", "count", "size"), [(4, 64, 32), (4, 7, 4), (3, 8, 3), (3, 64, 24), (3, 9, 6), (8, 5, 5), (2, 5, 2)]
)
def test_packed_sizes(bits, count, size):
    assert packed_length(count, bits) == size


def test_packing_refuses():
    with pytest.raises(ValueError, match="codes: expected 0 to 15, got 0 to 16"):
        pack_bits(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="codes: expected 0 to 7, got -1 to 0"):
        pack_bits(torch.tensor([-1, 0]), 3)
    with pytest.raises(TypeError, match="codes: expected integers"):
        pack_bits(torch.tensor([0.0]), 4)
    with pytest.raises(ValueError, match="bits: expected 1 to 8, got 9"):
        pack_bits(torch.tensor([1]), 9)
    with pytest.raises(ValueError, match="packed: expected rows of 4 bytes for 8 codes of 4 bits"):
        unpack_bits(torch.zeros(2, 3, dtype=torch.uint8), 4, 8)
    with pytest.raises(TypeError, match=r"packed: expected torch\.uint8"):
        unpack_bits(torch.zeros(4, dtype=torch.int8), 4, 8)


# ---------------------------------------------------------------- absmax and zero point


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
def test_absmax_by_hand(bits, granularity):
    x = random_matrix(bits, 6, 10)
    q = quantize_absmax(x, bits, granularity)
    top = 2 ** (bits - 1) - 1
    for i in range(6):
        for j in range(10):
            whole = x if granularity == "tensor" else x[i]
            scale = float(whole.abs().max() / top)
            assert q.codes[i, j] == round(float(x[i, j] / torch.tensor(scale)))
            assert dequantize(q)[i, j] == pytest.approx(scale * int(q.codes[i, j]), rel=1e-6)
    assert q.codes.dtype == torch.int8
    assert int(q.codes.abs().max()) == top


def test_channels_of_more_dimensions():
    x = torch.randn(3, 4, 5)
    channel, token = quantize_absmax(x, granularity="channel"), quantize_absmax(x, granularity="token")
    assert torch.equal(channel.scale.flatten() * 127, x.abs().amax((1, 2)))
    assert torch.equal(token.scale.squeeze(-1) * 127, x.abs().amax(-1))


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0, 100.0])
def test_zero_point_is_torchs_own(shift):
    """torch's fake_quantize by tensor and by channel, given our scales and zero points, gives the same values."""
    x = random_matrix(1, 12, 33) + shift
    q = quantize_zero_point(x)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(q.scale), int(q.zero), 0, 255)
    assert torch.allclose(dequantize(q), theirs, rtol=1e-6, atol=0)
    rows = quantize_zero_point(x, granularity="channel")
    scale, zero = rows.scale.flatten(), rows.zero.flatten().int()
    assert torch.allclose(
        dequantize(rows), torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 255), rtol=1e-6, atol=0
    )


def test_zero_point_parameters_are_an_observers():
    """The scale and zero point of torch's MinMaxObserver."""
    from torch.ao.quantization import MinMaxObserver

    for shift in (0.0, 2.0, -50.0):
        x = random_matrix(2, 20, 20) + shift
        observer = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        observer(x)
        scale, zero = observer.calculate_qparams()
        q = quantize_zero_point(x)
        assert float(q.scale) == pytest.approx(float(scale), rel=1e-6)
        assert int(q.zero) == int(zero)


@given(
    st.integers(0, 2**31), st.sampled_from([2, 3, 4, 5, 8]), st.sampled_from(["tensor", "channel", "token"]),
    st.sampled_from([quantize_absmax, quantize_zero_point]), st.sampled_from([1e-30, 1e-3, 1.0, 1e6]), st.floats(-3, 3),
)  # fmt: skip
@settings(deadline=None)
def test_errors_are_half_a_step_and_rounding_again_changes_nothing(seed, bits, granularity, quantize, size, shift):
    x = (random_matrix(seed, 5, 17) + shift) * size
    q = quantize(x, bits, granularity)
    error = (dequantize(q) - x).abs()
    slack = 2e-6 * x.abs()  # the products and quotients are fp32
    assert bool((error <= 0.5 * q.scale + slack).all())
    again = quantize(dequantize(q), bits, granularity)
    assert torch.allclose(dequantize(again), dequantize(q), rtol=1e-5, atol=float(q.scale.max()) * 1e-4)
    x[x.abs() < 0.5 * q.scale] = 0  # a zero comes back as a zero
    assert bool((dequantize(quantize(x, bits, granularity))[x == 0] == 0).all())


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize(("symmetric", "float_minimum"), SCHEMES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_code_is_the_nearest_on_its_grid(bits, symmetric, float_minimum):
    """Brute force: no other code of the group's grid lies nearer."""
    w = random_matrix(bits, 4, 90)  # groups of 64 and 26
    q = quantize_groups(w, bits, 64, symmetric, float_minimum)
    codes = torch.arange(q.scheme.lowest, q.scheme.highest + 1).double()
    assert len(codes) == 2**bits
    for row in range(4):
        for column in range(90):
            s = q.scale[row, column // 64].double()
            z = q.zero[row, column // 64].double() if q.zero is not None else 0.0
            values = s * codes + z if float_minimum else s * (codes - z)
            nearest = (values - w[row, column].double()).abs().min()
            error = abs(float(dequantize(q)[row, column].double() - w[row, column].double()))
            assert error <= float(nearest) + 1e-6


@pytest.mark.parametrize(("symmetric", "float_minimum"), SCHEMES)
def test_group_scales_by_hand(symmetric, float_minimum):
    w = random_matrix(3, 2, 70)
    q = quantize_groups(w, 4, 32, symmetric, float_minimum, scale_dtype=torch.float32)
    assert q.scale.shape == (2, 3)
    for row in range(2):
        for g, group in enumerate(w[row].split(32)):
            low, high = float(group.min()), float(group.max())
            if symmetric:
                assert float(q.scale[row, g]) == pytest.approx(max(-low, high) / 7, rel=1e-6)
            else:
                assert float(q.scale[row, g]) == pytest.approx((high - low) / 15, rel=1e-6)
                expected = low if float_minimum else round(-low / ((high - low) / 15))
                assert float(q.zero[row, g]) == pytest.approx(expected, rel=1e-6)


@given(
    st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 80), st.integers(1, 64), st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(SCHEMES), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)  # fmt: skip
@settings(deadline=None)
def test_groups_of_any_shape(seed, rows, columns, group_size, bits, scheme, dtype):
    w = random_matrix(seed, rows, columns, dtype)
    q = quantize_groups(w, bits, group_size, *scheme)
    step = q.scale.float().repeat_interleave(min(group_size, columns), 1)[:, :columns]
    error = (dequantize(q).double() - w.double()).abs()
    eps = torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    # a scale or a minimum in fp16 may be off by 2^-11 of itself
    slack = (
        (2**bits - 1) * 2**-10 * step + eps * w.abs().double() + (2**-10 * w.abs().double() if scheme[1] else 0) + 1e-7
    )
    assert bool((error <= 0.5 * step + slack).all())
    assert dequantize(q).dtype == dtype
    stored = q.parts()
    assert q.num_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    back = QuantizedTensor.from_parts(stored, q.description())
    assert torch.equal(back.codes, q.codes)
    assert back.codes.dtype == q.codes.dtype
    assert torch.equal(dequantize(back), dequantize(q))
    if not scheme[1]:
        w[:, ::2] = 0
        assert bool((dequantize(quantize_groups(w, bits, group_size, *scheme))[:, ::2] == 0).all())


@pytest.mark.parametrize(("symmetric", "float_minimum"), SCHEMES)
def test_the_grid_is_apart_from_the_rounding(symmetric, float_minimum):
    """Columns rounded one at a time, in any order, to a grid that was found before, are the whole weight's codes."""
    w = random_matrix(5, 8, 100)
    found = grid(w, 4, 32, symmetric, float_minimum)
    whole = quantize_groups(w, 4, 32, symmetric, float_minimum)
    codes = torch.zeros_like(whole.codes)
    for column in torch.randperm(100):
        at = column[None]
        codes[:, at] = round_to(w[:, at], found, at)
        assert torch.equal(values_on(codes[:, at], found, at), dequantize(whole)[:, at])
    assert torch.equal(codes, whole.codes)
    assert torch.equal(dequantize(found.tensor(codes, w.dtype)), dequantize(whole))
    beyond = round_to(w * 100, found)  # what a solver moved off the grid goes to its edge
    assert int(beyond.min()) == whole.scheme.lowest
    assert int(beyond.max()) == whole.scheme.highest


def test_ties_go_to_even_and_zeros_stay():
    w = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0, -0.0]])
    assert quantize_groups(w, 4, 8).codes.tolist() == [[7, 0, 2, 2, 0, -2, 0, 0]]
    zeros = torch.zeros(3, 10)
    for scheme in SCHEMES:
        q = quantize_groups(zeros, 4, 4, *scheme)
        assert bool((dequantize(q) == 0).all())
    for quantize in (quantize_absmax, quantize_zero_point, quantize_fp8):
        assert bool((dequantize(quantize(zeros)) == 0).all())


def test_a_constant_group_is_its_minimum():
    w = torch.full((2, 8), 0.3)
    assert torch.equal(dequantize(quantize_groups(w, 4, 4, False, True)), torch.full((2, 8), 0.3).half().float())


def test_bits_a_weight():
    """4 bits and 16 of a scale for 64: 4.25; with a zero point of 4 bits 4.3125, with a minimum 4.5; 3 bits: 3.25."""
    w = torch.randn(64, 1024)
    for bits, scheme, expected in [
        (4, (True, False), 4.25),
        (4, (False, False), 4.3125),
        (4, (False, True), 4.5),
        (3, (True, False), 3.25),
    ]:
        assert quantize_groups(w, bits, 64, *scheme).num_bytes * 8 / w.numel() == expected
    assert quantize_absmax(w).num_bytes == w.numel() + 4
    assert quantize_fp8(w, granularity="row").num_bytes == w.numel() + 4 * 64


@pytest.mark.parametrize("quantize", [quantize_absmax, quantize_zero_point, quantize_fp8, quantize_groups])
def test_bad_tensors_are_refused(quantize):
    with pytest.raises(TypeError, match=r"(x|weight): expected a torch\.Tensor, got list"):
        quantize([1.0])
    with pytest.raises(TypeError, match=r"expected a floating dtype of 16 bits or more, got torch\.int64"):
        quantize(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected values, got the empty shape"):
        quantize(torch.ones(2, 0))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="expected finite values"):
            quantize(torch.tensor([[1.0, bad]]))


def test_bad_arguments_are_refused():
    w = torch.randn(4, 8)
    for bits in (1, 9, 16, True):
        with pytest.raises(ValueError, match="bits: expected one of 2, 3"):
            quantize_groups(w, bits)
        with pytest.raises(ValueError, match="bits: expected one of 2, 3"):
            quantize_absmax(w, bits)
    with pytest.raises(
        ValueError,
        match="granularity: expected one of 'tensor', 'channel', 'token', got 'chanel'; did you mean 'channel'",
    ):
        quantize_absmax(w, granularity="chanel")
    with pytest.raises(ValueError, match="group_size: expected a whole number of at least 1"):
        quantize_groups(w, group_size=0)
    with pytest.raises(ValueError, match="weight: expected 2 dimensions"):
        quantize_groups(w[0])
    with pytest.raises(ValueError, match="float_minimum: expected False where symmetric is True"):
        quantize_groups(w, float_minimum=True)
    with pytest.raises(ValueError, match=r"weight: expected scales that fit in torch\.float16"):
        quantize_groups(w * 1e8)
    assert torch.isfinite(dequantize(quantize_groups(w * 1e8, scale_dtype=torch.float32))).all()
    with pytest.raises(ValueError, match="format: expected one of 'e4m3', 'e5m2'"):
        quantize_fp8(w, "e3m4")
    with pytest.raises(TypeError, match="quantized: expected a quantized tensor, got Tensor"):
        dequantize(w)


# ---------------------------------------------------------------- FP8


def fp8_value(byte, exponent_bits):
    """The value of 8 bits from the definition: sign, exponent, mantissa; None where it is no finite number."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if byte >> 7 else 1.0
    exponent, mantissa = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1), byte & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    top = exponent == (1 << exponent_bits) - 1
    if top and (exponent_bits == 5 or mantissa == 7):  # e4m3 has one NaN and no infinity
        return None
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(("format", "exponent_bits", "top", "finite"), [("e4m3", 4, 448, 254), ("e5m2", 5, 57344, 248)])
def test_every_finite_fp8_value_comes_back(format, exponent_bits, top, finite):
    every = {byte: fp8_value(byte, exponent_bits) for byte in range(256)}
    values = {byte: value for byte, value in every.items() if value is not None}
    assert len(values) == finite
    assert max(values.values()) == top == largest(format)
    x = torch.tensor(list(values.values()))
    assert to_fp8(x, format).view(torch.uint8).tolist() == list(values)
    q = quantize_fp8(x, format)  # the largest is there, so the scale is 1
    assert float(q.scale) == 1
    assert torch.equal(dequantize(q), x)


@pytest.mark.parametrize("format", FP8)
def test_fp8_saturates(format):
    top = largest(format)
    x = torch.tensor([top * 1.01, top * 2, 1e30, -top * 3, float("inf")])
    assert to_fp8(x, format).float().tolist() == [top, top, top, -top, top]


@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_rounds_as_torch_casts(format, dtype):
    x = random_matrix(7, 40, 50, dtype)
    for granularity in ("tensor", "row"):
        q = quantize_fp8(x, format, granularity)
        relative = x.float() / q.scale
        assert torch.equal(
            q.codes.view(torch.uint8),
            relative.clamp(-largest(format), largest(format)).to(FP8[format]).view(torch.uint8),
        )
        assert q.scale.shape == ((40, 1) if granularity == "row" else ())
        mantissa, least = (2**-4, 2**-10) if format == "e4m3" else (2**-3, 2**-17)
        error = (q.codes.float() * q.scale - x.float()).abs()
        assert bool((error <= (mantissa * x.float().abs()).clamp(min=least * q.scale) * 1.0001).all())
        assert torch.equal(QuantizedTensor.from_parts(q.parts(), q.description()).dequantize(), dequantize(q))


# ---------------------------------------------------------------- products in int8


@pytest.mark.parametrize("K", [1, 7, 576, 4096, 16384])
def test_int8_products_are_exact(K):
    generator = torch.Generator().manual_seed(K)
    a, b = (torch.randint(-128, 128, (n, K), dtype=torch.int8, generator=generator) for n in (5, 9))
    exact = a.long() @ b.long().t()
    assert torch.equal(int8_product(a, b).long(), exact)
    assert torch.equal(product_by_chunks(a, b).long(), exact)
    extremes = torch.full((2, K), -128, dtype=torch.int8)
    for product in (int8_product, product_by_chunks):
        assert bool((product(extremes, extremes) == 128 * 128 * K).all())


def test_int8_products_refuse():
    a = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"expected torch\.int8"):
        int8_product(a.float(), a)
    with pytest.raises(ValueError, match=r"expected \[M, K\] and \[N, K\]"):
        int8_product(a, a.t())
    with pytest.raises(ValueError, match="expected at most 131071 columns"):
        int8_product(torch.zeros(1, 131072, dtype=torch.int8), torch.zeros(1, 131072, dtype=torch.int8))


def test_outliers_are_taken_out():
    """By hand: the outlier columns in floats, the others by the int8 formula in fp64."""
    x, w = random_matrix(11, 30, 64, heavy=False), random_matrix(12, 20, 64, heavy=False)
    x[:, [3, 40]] *= 30
    x[5, 9] = 6.0
    weight = quantize_absmax(w, granularity="channel")
    columns = outlier_columns(x).tolist()
    assert columns == sorted({j for j in range(64) if any(abs(float(x[i, j])) >= 6 for i in range(30))})
    assert {3, 9, 40} <= set(columns)
    rest = [j for j in range(64) if j not in columns]
    ordinary = x[:, rest].double()
    s = ordinary.abs().amax(1, keepdim=True) / 127
    expected = (ordinary / s).round() * s @ (weight.codes[:, rest].double() * weight.scale).t()
    expected += x[:, columns].double() @ (weight.codes[:, columns].double() * weight.scale).t()
    assert torch.allclose(llm_int8_product(x, weight).double(), expected, rtol=1e-4, atol=1e-4)
    plain = llm_int8_product(x, weight, threshold=1e9)
    exact = x.double() @ w.double().t()
    assert float((llm_int8_product(x, weight) - exact).norm()) < 0.5 * float((plain - exact).norm())


def test_outliers_as_bitsandbytes_has_them():
    """bitsandbytes' own LLM.int8 product on a CPU; it keeps an outlier column's small entries in a row's maximum, so not bit for bit."""
    import bitsandbytes

    x, w = random_matrix(13, 16, 128, heavy=False), random_matrix(14, 24, 128, heavy=False)
    x[:, 7] *= 25
    codes, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(w.clone())
    weight = quantize_absmax(w, granularity="channel")
    assert torch.equal(weight.codes, codes)
    assert torch.allclose(weight.scale.flatten() * 127, scale)
    state = bitsandbytes.MatmulLtState()
    state.is_training = False  # else it leaves the inputs as they are on a CPU
    state.CB, state.SCB, state.has_fp16_weights, state.threshold = codes, scale, False, 6.0
    theirs = bitsandbytes.matmul(x.half(), w.half(), state=state)
    ours = llm_int8_product(x.half(), weight)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01


def test_outlier_products_refuse():
    weight = quantize_absmax(torch.randn(4, 8), granularity="channel")
    with pytest.raises(ValueError, match=r"x: expected \[tokens, 8\], got the shape \(2, 7\)"):
        llm_int8_product(torch.randn(2, 7), weight)
    with pytest.raises(ValueError, match="weight: expected int8 with a scale for each channel"):
        llm_int8_product(torch.randn(2, 8), quantize_absmax(torch.randn(4, 8)))
    with pytest.raises(ValueError, match="threshold: expected a number above 0"):
        llm_int8_product(torch.randn(2, 8), weight, 0)


@pytest.mark.gpu
def test_int8_products_are_exact_on_a_gpu():
    for M, K, N in [(1, 7, 5), (16, 576, 9), (33, 16384, 64)]:
        a, b = (torch.randint(-128, 128, (n, K), dtype=torch.int8) for n in (M, N))
        assert torch.equal(int8_product(a.cuda(), b.cuda()).cpu().long(), a.long() @ b.long().t())
