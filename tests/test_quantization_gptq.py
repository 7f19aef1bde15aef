"""GPTQ is OBS with rounding; without ties between the inputs it is rounding to nearest."""

import pytest
import torch

from llmlab.kernels import kernels_for, reference
from llmlab.obs import inverse_factor
from llmlab.quantization.clipping import clipped_grid
from llmlab.quantization.gptq import gptq_quantize
from llmlab.quantization.integer import grid, quantize_groups


def correlated(columns, samples=512, seed=0, dtype=torch.float64):
    """Inputs [samples, columns] whose channels share directions and differ in size."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=dtype) / columns**0.5 + torch.eye(columns, dtype=dtype)
    sizes = torch.logspace(-1, 0.5, columns, dtype=dtype)[torch.randperm(columns)]
    return torch.randn(samples, columns, dtype=dtype) @ mixing * sizes


def output_error(x, weight, quantized):
    return float(((weight - quantized.dequantize().to(weight.device)) @ x.T).norm())


def naive_gptq(weight, hessian, bits, group_size, damp):
    """Act-order, static groups, symmetric: a column at a time over the whole matrix, the inverse updated explicitly."""
    w, n = weight.clone(), weight.shape[1]
    highest = 2 ** (bits - 1) - 1
    scale = w.view(len(w), -1, group_size).abs().amax(-1) / highest
    scale = scale.to(torch.float16).to(w.dtype).repeat_interleave(group_size, 1)
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(n, dtype=w.dtype))
    codes = torch.zeros_like(w)
    for j in hessian.diagonal().argsort(descending=True).tolist():
        codes[:, j] = (w[:, j] / scale[:, j]).round().clamp(-highest - 1, highest)
        error = (w[:, j] - codes[:, j] * scale[:, j]) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes.to(torch.int8)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("block_size", [8, 48, 128])
def test_codes_are_those_of_a_naive_sweep(bits, block_size):
    x = correlated(96)
    hessian, weight = x.T @ x / len(x), torch.randn(16, 96, dtype=torch.float64)
    got = gptq_quantize(weight, hessian, bits, 32, damp=0.1, block_size=block_size)
    assert torch.equal(got.codes, naive_gptq(weight, hessian, bits, 32, 0.1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 700.0])
def test_independent_inputs_give_rounding_to_nearest_bit_for_bit(symmetric, act_order, scale):
    weight = torch.randn(24, 200)
    got = gptq_quantize(weight, scale * torch.eye(200), 4, 64, symmetric, act_order)
    expected = quantize_groups(weight, 4, 64, symmetric)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(got.dequantize(), expected.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_never_further_off_than_rounding_leaves_them(bits, symmetric):
    for seed in range(4):
        x = correlated(128, seed=seed).float()
        weight = torch.randn(32, 128)
        got = gptq_quantize(weight, x.T @ x / len(x), bits, 64, symmetric)
        rounded = quantize_groups(weight, bits, 64, symmetric)
        assert output_error(x, weight, got) < 0.95 * output_error(x, weight, rounded)


def test_storage_stays_in_the_weights_own_order():
    """Act-order changes which column is rounded first, not where it lies nor whose scale it has."""
    x = correlated(128, seed=5)
    hessian, weight = x.T @ x / len(x), torch.randn(8, 128, dtype=torch.float64)
    got = gptq_quantize(weight, hessian, 8, 32)
    assert torch.equal(got.scale, quantize_groups(weight, 8, 32).scale)
    assert (got.dequantize() - weight).abs().max() < 0.2
    first = int(hessian.diagonal().argmax())
    assert torch.equal(got.codes[:, first], quantize_groups(weight, 8, 32).codes[:, first])  # no error has reached it


def test_dead_inputs_are_rounded_and_trouble_no_one():
    x = correlated(64, seed=6)
    x[:, :5] = 0
    weight = torch.randn(8, 64, dtype=torch.float64)
    got = gptq_quantize(weight, x.T @ x / len(x), 4, 32)
    assert torch.equal(got.codes[:, :5], quantize_groups(weight, 4, 32).codes[:, :5])
    nothing = gptq_quantize(weight, torch.zeros(64, 64, dtype=torch.float64), 4, 32)
    assert torch.equal(nothing.codes, quantize_groups(weight, 4, 32).codes)


def test_groups_that_are_not_static_follow_what_the_weight_has_become():
    x = correlated(100, seed=7)
    hessian, weight = x.T @ x / len(x), torch.randn(8, 100, dtype=torch.float64)
    got = gptq_quantize(weight, hessian, 4, 32, act_order=False, static_groups=False, block_size=40)
    plain = quantize_groups(weight, 4, 32)
    assert got.scale.shape == plain.scale.shape == (8, 4)
    assert torch.equal(got.scale[:, 0], plain.scale[:, 0])  # nothing has been rounded before the first group
    assert not torch.equal(got.scale[:, 1:], plain.scale[:, 1:])
    assert output_error(x, weight, got) < output_error(x, weight, plain)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_pruned_weight_stays_pruned(symmetric):
    x = correlated(96, seed=11)
    weight = torch.randn(16, 96, dtype=torch.float64)
    weight[weight.abs() < weight.abs().median()] = 0
    got = gptq_quantize(weight, x.T @ x / len(x), 4, 32, symmetric)
    assert ((got.dequantize() == 0) | (weight != 0)).all()
    assert output_error(x, weight, got) < output_error(x, weight, quantize_groups(weight, 4, 32, symmetric))


def test_a_clipped_grid_loses_less_at_the_outputs():
    for bits in (3, 4):
        x = correlated(120, seed=bits).float()
        weight = torch.randn(16, 120)
        weight[:, ::17] *= 4
        H = x.T @ x / len(x)
        found, plain = clipped_grid(weight, H, bits, 32), grid(weight, bits, 32)
        assert (found.scale <= plain.scale).all()
        assert (found.scale < plain.scale).any()
        # H of separate groups: there the clipping's own loss is the loss at the outputs
        blocks = torch.block_diag(*[H[g : g + 32, g : g + 32] for g in range(0, 120, 32)])

        def loss(grid_of, weight=weight, blocks=blocks):
            from llmlab.quantization.integer import round_to, values_on

            d = weight - values_on(round_to(weight, grid_of), grid_of)
            return ((d @ blocks) * d).sum(-1)

        assert (loss(found) <= loss(plain) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hessian": torch.eye(7)}, "hessian: expected"),
        ({"hessian": torch.full((8, 8), float("nan"))}, "hessian: expected finite"),
        ({"weight": torch.full((2, 8), float("inf"))}, "weight: expected finite"),
        ({"bits": 1}, "bits: expected one of"),
        ({"group_size": 0}, "group_size: expected"),
        ({"damp": -0.1}, "damp: expected"),
        ({"static_groups": False}, "static_groups: expected True with act_order"),
    ],
)
def test_wrong_arguments_are_refused(change, says):
    given = {"weight": torch.randn(2, 8), "hessian": torch.eye(8), **change}
    with pytest.raises(ValueError, match=says):
        gptq_quantize(**given)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernels_sweep_is_the_sweep_of_codes(symmetric):
    """A block rounded by the kernel's twin, and by the column step that floats minima take."""
    from llmlab.obs import by_columns
    from llmlab.quantization.gptq import _rounding

    x, weight = correlated(48, seed=8).float(), torch.randn(16, 48)
    weight[3, :32] = 0
    found, factor = grid(weight, 3, 32, symmetric), inverse_factor(x.T @ x / len(x), 0.1)
    scale, zero = found.at()
    expected = by_columns(_rounding(scale, zero, found.scheme))(weight, factor, 0)
    got = reference.round_columns(weight, factor, scale, zero, found.scheme.lowest, found.scheme.highest)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (37, 96), (5, 17)], ids=str)
def test_rounding_a_block_on_a_gpu(symmetric, shape):
    rows, width = shape
    x, weight = correlated(width, seed=9).float(), torch.randn(rows, width + 8)
    found, factor = grid(weight[:, :width], 4, 32, symmetric), inverse_factor(x.T @ x / len(x), 0.1)
    scale, zero = found.at()
    expected = reference.round_columns(
        weight[:, :width], factor, scale, zero, found.scheme.lowest, found.scheme.highest
    )
    given = [None if t is None else t.cuda() for t in (weight, factor, scale, zero)]
    got = kernels_for("cuda").round_columns(given[0][:, :width], *given[1:], found.scheme.lowest, found.scheme.highest)
    for ours, theirs in zip(got, expected, strict=True):
        assert not ours.isnan().any()
        assert (ours.cpu() - theirs).norm() / theirs.norm() < 1e-3


@pytest.mark.gpu
def test_gptq_on_a_gpu_chooses_the_codes_of_the_cpu():
    x, weight = correlated(256, seed=10).float(), torch.randn(128, 256)
    hessian = x.T @ x / len(x)
    expected = gptq_quantize(weight, hessian, 4, 64)
    got = gptq_quantize(weight.cuda(), hessian.cuda(), 4, 64)
    assert (got.codes.cpu() == expected.codes).float().mean() > 0.999  # a tie may fall to the other side
    assert output_error(x, weight, got) == pytest.approx(output_error(x, weight, expected), rel=1e-3)
