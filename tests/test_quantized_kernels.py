"""Kernels on quantized matrices: layouts hold what they say, twins do the plain formula, Triton does what its twin does."""

import pytest
import torch

from llmlab.kernels import kernels_for
from llmlab.kernels import reference as twin
from llmlab.kernels.layouts import Nf4Weight, pack_int4, unpack_int4

GPU = pytest.mark.gpu
SIZES = [(64, 256, 64), (100, 576, 64), (192, 1536, 128), (130, 384, 128)]  # N, K, group size


def int4_weight(N, K, group_size, device="cpu", symmetric=True):
    """Codes and zeros of the whole range and scales of many sizes, packed; and all of them as they were."""
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    scales = (torch.rand(N, K // group_size) + 0.1).bfloat16()
    zeros = None if symmetric else torch.randint(-8, 8, scales.shape, dtype=torch.int8)
    packed = pack_int4(codes.to(device), scales.to(device), None if zeros is None else zeros.to(device))
    return packed, codes, scales, zeros


def nf4_weight(N, K, nested, device="cpu"):
    """A matrix that bitsandbytes has quantized, and what it makes of it."""
    from bitsandbytes import functional

    matrix = torch.randn(N, K).bfloat16()
    codes, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=nested)
    extra = (state.state2.code, state.state2.absmax, state.offset.view(1)) if nested else (None,) * 3
    tensors = [codes.view(-1), state.absmax, state.code]
    moved = [None if t is None else t.to(device) for t in (*tensors, *extra)]
    return Nf4Weight(*moved[:3], N, K, *moved[3:]), functional.dequantize_4bit(codes, state)


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_codes_come_back(size, symmetric):
    packed, codes, scales, zeros = int4_weight(*size, symmetric=symmetric)
    found, found_scales, found_zeros = unpack_int4(packed)
    assert torch.equal(found, codes)
    assert torch.equal(found_scales, scales)
    assert found_zeros is None if symmetric else torch.equal(found_zeros, zeros)


def test_a_word_holds_eight_columns_where_the_layout_says():
    packed, codes, *_ = int4_weight(128, 512, 64)
    for band, tile, row, c in ((0, 0, 0, 0), (1, 1, 63, 31), (1, 0, 17, 5)):
        word = int(packed.words[band, tile, row, c]) & 0xFFFFFFFF
        for i in range(4):
            for half in range(2):
                column = 256 * tile + 64 * i + 2 * c + half
                assert (word >> (4 * i + 16 * half)) & 15 == int(codes[64 * band + row, column]) + 8


def test_a_packed_matrix_takes_four_bits_a_weight_and_sixteen_a_group():
    assert int4_weight(192, 1536, 128)[0].num_bytes == 192 * 1536 * (4 + 16 / 128) / 8
    assert int4_weight(192, 1536, 128, symmetric=False)[0].num_bytes == 192 * 1536 * (4 + 32 / 128) / 8


@pytest.mark.parametrize(
    ("codes", "scales", "named"),
    [
        (torch.full((64, 256), 8), torch.ones(64, 4), "codes"),
        (torch.zeros(64, 256), torch.ones(64, 4), "codes"),
        (torch.zeros(64, 256, dtype=torch.int8), torch.ones(64, 8), "scales"),
        (torch.zeros(64, 256, dtype=torch.int8), torch.ones(32, 4), "scales"),
    ],
)
def test_what_cannot_be_packed_is_named(codes, scales, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        pack_int4(codes, scales)


@pytest.mark.parametrize("zeros", [torch.zeros(64, 4), torch.zeros(64, 2, dtype=torch.int8), torch.full((64, 4), 8)])
def test_zeros_that_cannot_be_packed_are_named(zeros):
    with pytest.raises(ValueError, match=r"^zeros: expected"):
        pack_int4(torch.zeros(64, 256, dtype=torch.int8), torch.ones(64, 4), zeros)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_int4_twin_is_codes_times_scales(size, symmetric):
    N, K, group_size = size
    packed, codes, scales, zeros = int4_weight(*size, symmetric=symmetric)
    matrix = codes.double() * scales.double().repeat_interleave(group_size, 1)
    if zeros is not None:
        matrix -= (zeros.double() * scales.double()).repeat_interleave(group_size, 1)
    x, bias = torch.randn(3, K, dtype=torch.float64), torch.randn(N)
    assert torch.equal(twin.dequantize_int4(packed), matrix.bfloat16())
    assert relative(twin.int4_linear(x.float(), packed, bias), x @ matrix.T + bias.double()) < 1e-5


@pytest.mark.parametrize("nested", [False, True])
def test_the_nf4_twin_is_bitsandbytes_bit_for_bit(nested):
    weight, theirs = nf4_weight(30, 576, nested)
    assert torch.equal(twin.dequantize_nf4(weight), theirs)
    x, bias = torch.randn(2, 576), torch.randn(30)
    # the matrix of the product is not rounded to bfloat16
    assert relative(twin.nf4_linear(x, weight, bias), x.double() @ theirs.double().T + bias.double()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_rows_are_quantized_to_half_a_step(dtype):
    x = torch.randn(9, 192) * torch.logspace(-6, 6, 9)[:, None]
    x[4] = 0
    codes, scales = twin.quantize_rows(x, dtype)
    largest = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}[dtype]
    reached = codes.float().abs().amax(1)
    assert torch.equal(
        reached, torch.where(x.abs().amax(1) > 0, float(largest), 0.0)
    )  # the range is used, and not left
    assert float(scales[4]) == 0.0
    mantissa = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}.get(dtype)
    step = 1.0 if mantissa is None else 2.0**-mantissa * codes.float().abs().clamp(min=2.0**-6)
    assert ((codes.float() * scales[:, None] - x).abs() <= 0.5001 * step * scales[:, None]).all()


def test_int8_products_are_exact_to_the_longest_sums():
    K = 16384
    codes = torch.full((2, K), 127, dtype=torch.int8)
    codes[1, ::3] = -126
    expected = [
        [sum(int(a) * int(b) for a, b in zip(u.tolist(), v.tolist(), strict=True)) for v in codes] for u in codes
    ]
    found = twin.scaled_product(codes, torch.ones(2), codes, torch.ones(2), dtype=torch.float64)
    assert found.tolist() == expected


@pytest.mark.parametrize("name", ["int8_linear", "fp8_linear"])
def test_a_product_of_8_bits_is_near_the_full_one(name):
    x, matrix, bias = torch.randn(5, 640), torch.randn(48, 640), torch.randn(48)
    dtype = torch.int8 if name == "int8_linear" else torch.float8_e4m3fn
    codes, scales = twin.quantize_rows(matrix, dtype)
    found = getattr(twin, name)(x, codes, scales, bias)
    assert relative(found, x.double() @ matrix.double().T + bias.double()) < (0.015 if dtype == torch.int8 else 0.05)


def test_columns_that_the_copy_engine_cannot_take_are_named():
    codes = torch.ones(4, 24, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^x: expected a multiple of 16 columns, got 24"):
        twin.scaled_product(codes, torch.ones(4), codes, torch.ones(4))


def poison(*shape):
    """Leave NaN where the next tensor of this size will lie."""
    held = torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16)
    del held


@GPU
@pytest.mark.parametrize("size", [*SIZES, (4096, 4096, 128)], ids=str)
@pytest.mark.parametrize(("M", "symmetric"), [(1, True), (1, False), (17, True), (64, False), (65, True)])
@pytest.mark.parametrize("tiling", [(64, 1, 4, 3, 0, 16), (64, 3, 2, 2, 2, 8), (128, 2, 8, 3, 1, 8)], ids=str)
def test_int4_products_on_a_gpu(size, M, symmetric, tiling):
    from llmlab.kernels.int4 import Int4Tiling

    fused = kernels_for("cuda")
    packed, *_ = int4_weight(*size, "cuda", symmetric)
    x = torch.randn(M, size[1], device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(size[0], device="cuda", dtype=torch.bfloat16) if M % 2 else None
    counters = fused.int4_counters(size[0], x.device)
    expected = twin.int4_linear(x, packed, bias)
    for _ in range(2):  # the counters end as they began
        poison(M, size[0])
        got = fused.int4_linear(x, packed, bias, counters, Int4Tiling(*tiling))
        assert relative(got, expected) < 1e-2
        assert not got.isnan().any()
        assert int(counters.abs().sum()) == 0
    assert relative(fused.int4_linear(x, packed, bias), expected) < 1e-2


@GPU
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int4_matrices_unpack_on_a_gpu(size, symmetric):
    packed, *_ = int4_weight(*size, "cuda", symmetric)
    poison(*size[:2])
    assert torch.equal(kernels_for("cuda").dequantize_int4(packed), twin.dequantize_int4(packed))


@GPU
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [(30, 576), (257, 4096), (48, 14336)], ids=str)
@pytest.mark.parametrize("tiling", [None, (4, 512, 4, False), (8, 256, 2, True)], ids=str)
def test_nf4_products_on_a_gpu(size, nested, tiling):
    from llmlab.kernels.nf4 import Nf4Tiling

    fused = kernels_for("cuda")
    weight, theirs = nf4_weight(*size, nested, "cuda")
    poison(*size)
    unpacked = fused.dequantize_nf4(weight)
    assert relative(unpacked, theirs.cuda()) < 1e-3  # a last place apart where multiply and add are one
    for M in (1, 3):
        x = torch.randn(M, size[1], device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(size[0], device="cuda", dtype=torch.bfloat16) if M == 1 else None
        poison(M, size[0])
        got = fused.nf4_linear(x, weight, bias, Nf4Tiling(*tiling) if tiling else None)
        assert relative(got, twin.nf4_linear(x, weight, bias)) < 1e-2
        assert not got.isnan().any()


@GPU
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("K", [64, 576, 4096, 14336])
def test_rows_are_quantized_on_a_gpu(dtype, K):
    x = torch.randn(33, K, device="cuda", dtype=torch.bfloat16) * torch.logspace(-3, 3, 33, device="cuda")[:, None]
    x[7] = 0
    x = x.bfloat16()
    got, scales = kernels_for("cuda").quantize_rows(x, dtype)
    expected, expected_scales = twin.quantize_rows(x.cpu(), dtype)
    assert torch.equal(got.cpu().float(), expected.float())
    assert torch.allclose(scales.cpu(), expected_scales, rtol=1e-6, atol=0)


@GPU
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("size", [(128, 256, 512), (70, 100, 192), (1, 4096, 4096), (300, 520, 16384)], ids=str)
@pytest.mark.parametrize("tiling", [(64, 64, 64, 4, 3, 2), (128, 128, 128, 4, 3, 8), (128, 256, 128, 8, 4, 8)], ids=str)
def test_products_of_8_bits_on_a_gpu(dtype, size, tiling):
    from llmlab.kernels.rowwise import ProductTiling

    M, N, K = size
    fused = kernels_for("cuda")
    x, matrix = (torch.randn(n, K, device="cuda", dtype=torch.bfloat16) for n in (M, N))
    bias = torch.randn(N, device="cuda", dtype=torch.bfloat16)
    codes, scales = twin.quantize_rows(matrix, dtype)
    rows, row_scales = twin.quantize_rows(x, dtype)
    poison(M, N)
    got = fused.scaled_product(rows, row_scales, codes, scales, bias, tiling=ProductTiling(*tiling))
    assert relative(got, twin.scaled_product(rows, row_scales, codes, scales, bias)) < 1e-2
    assert not got.isnan().any()
    name = "int8_linear" if dtype == torch.int8 else "fp8_linear"
    assert relative(getattr(fused, name)(x, codes, scales, bias), getattr(twin, name)(x, codes, scales, bias)) < 1e-2
