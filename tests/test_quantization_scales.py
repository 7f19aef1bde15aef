"""AWQ and SmoothQuant: scales that leave the function as it is, and make rounding hurt less; half-quadratic minima."""

import copy

import pytest
import torch
from test_calibration import shaken

from llmlab.calibration import LayerStatistics, calibration_windows, gather_statistics, visit_blocks
from llmlab.checkpoint import load_model
from llmlab.model import Transformer
from llmlab.quantization.awq import awq_scales, search_scales
from llmlab.quantization.clipping import clipped_grid
from llmlab.quantization.folding import fold, folds, head_size
from llmlab.quantization.gptq import gptq_quantize
from llmlab.quantization.half_quadratic import quantize_half_quadratic
from llmlab.quantization.integer import quantize_absmax, quantize_groups, round_to, values_on
from llmlab.quantization.layerwise import METHODS, quantize_layers, smooth_model
from llmlab.quantization.smooth import smooth_scales


def salient(columns=128, samples=256, seed=0):
    """Inputs of which a few channels are much larger than the rest."""
    torch.manual_seed(seed)
    sizes = torch.ones(columns)
    sizes[torch.randperm(columns)[:4]] = 30.0
    return torch.randn(samples, columns) * sizes


def round_trip(weight, bits=3):
    """Symmetric rounding in groups of 64, in three lines."""
    groups = weight.view(len(weight), -1, 64)
    scale = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
    return ((groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view_as(weight)


def test_awq_finds_the_best_power_of_the_inputs_size():
    for seed in range(3):
        x, weight = salient(seed=seed), torch.randn(32, 128)
        got = awq_scales(weight, x, bits=3)
        errors = {}
        for step in range(20):
            s = x.abs().mean(0) ** (step / 20)
            s = s / (s.max() * s.min()).sqrt()
            errors[step] = float((x @ (weight - round_trip(weight * s) / s).T).norm())
            if step == 0:
                plain = errors[0]
        best = min(errors, key=errors.get)
        s = x.abs().mean(0) ** (best / 20)
        assert best > 0
        assert torch.allclose(got, s / (s.max() * s.min()).sqrt())
        assert errors[best] < 0.7 * plain


def test_awq_is_never_worse_than_rounding_in_the_layers_error():
    for seed in range(6):
        torch.manual_seed(seed)
        x, weight = torch.randn(64, 96) * torch.rand(96) ** (seed - 2), torch.randn(8, 96)
        s = awq_scales(weight, x, bits=4, group_size=32, symmetric=seed % 2 == 0)
        rounded = quantize_groups(weight, 4, 32, seed % 2 == 0).dequantize()
        scaled = quantize_groups(weight * s, 4, 32, seed % 2 == 0).dequantize() / s
        assert (x @ (weight - scaled).T).norm() <= (x @ (weight - rounded).T).norm() * (1 + 1e-6)


def test_awq_from_statistics_is_awq_from_inputs_and_bears_dead_channels():
    x, weight = salient(), torch.randn(16, 128)
    x[:, 3] = 0
    seen = LayerStatistics.of(x)
    got = search_scales(weight, seen.mean_abs, seen.hessian, 3)
    assert torch.allclose(got, awq_scales(weight, x, 3))
    assert torch.isfinite(got).all()
    assert (got > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_shares_the_outliers_and_changes_no_product(alpha):
    x, weight = salient().double(), torch.randn(16, 128).double()
    s = smooth_scales(x.abs().amax(0), weight, alpha)
    assert torch.allclose((x / s) @ (weight * s).T, x @ weight.T, atol=1e-12)
    inputs, largest = (x / s).abs().amax(0), (weight * s).abs().amax(0)
    if alpha == 0.5:
        assert torch.allclose(inputs, largest)
    if alpha == 1:
        assert torch.allclose(inputs, torch.ones(128).double())
    if alpha == 0:
        assert torch.allclose(largest, torch.ones(128).double())


def test_smoothing_helps_rounding_of_activations_by_token():
    x, weight = salient(), torch.randn(16, 128)

    def error(x_scaled, w_scaled):
        got = (
            quantize_absmax(x_scaled, 8, "token").dequantize() @ quantize_absmax(w_scaled, 8, "channel").dequantize().T
        )
        return (got - x @ weight.T).norm()

    s = smooth_scales(x.abs().amax(0), weight)
    assert error(x / s, weight * s) < 0.5 * error(x, weight)


def test_smoothing_leaves_silent_channels():
    s = smooth_scales(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([[1.0, 0.0, 8.0]]))
    assert s.tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("ours", [False, True])
def test_folded_scales_leave_the_function_and_divide_the_inputs(kind, ours):
    theirs, token_ids = shaken(kind).double(), torch.randint(0, 320, (2, 9))
    with torch.no_grad():
        expected = theirs(token_ids).logits
    before = gather_statistics(theirs, token_ids)
    model = Transformer.from_transformers(theirs) if ours else theirs
    blocks = model.layers if ours else model.model.layers
    generator = torch.Generator().manual_seed(1)
    for block in blocks:
        for where in folds(block, head_size(model)):
            columns = block.get_parameter(f"{where.consumers[0]}.weight").shape[1]
            fold(block, where, where.shared(torch.rand(columns, generator=generator, dtype=torch.float64) + 0.5))
    if ours:
        stream = gather_logits(model, token_ids)
        assert torch.allclose(stream, expected, atol=1e-4)
        return
    with torch.no_grad():
        assert torch.allclose(model(token_ids).logits, expected, atol=1e-9)
    after = gather_statistics(model, token_ids)
    assert all(not torch.allclose(after[name].absmax, before[name].absmax, rtol=0.01) for name in after)


def gather_logits(model, token_ids):
    stream = visit_blocks(model, token_ids)
    with torch.no_grad():
        return model.logits(stream.flatten(0, 1)).view(*token_ids.shape, -1)


def test_scales_that_differ_within_one_row_are_refused_and_nothing_changes():
    model = shaken("llama")
    block, where = model.model.layers[0], list(folds(model.model.layers[0], head_size(model)))[1]
    before = copy.deepcopy(block.state_dict())
    for wrong, says in ((torch.rand(48) + 0.5, "one scale for all channels"), (torch.zeros(48), "positive")):
        with pytest.raises(ValueError, match=says):
            fold(block, where, wrong)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_smoothing_a_model_leaves_its_logits():
    model, token_ids = shaken("llama").double(), torch.randint(0, 320, (3, 8))
    with torch.no_grad():
        expected = model(token_ids).logits
        before = gather_statistics(model, token_ids)["model.layers.1.mlp.down_proj"]
        smooth_model(model, token_ids)
        assert torch.allclose(model(token_ids).logits, expected, atol=1e-9)
    after = gather_statistics(model, token_ids)["model.layers.1.mlp.down_proj"]
    assert after.absmax.max() / after.absmax.min() < before.absmax.max() / before.absmax.min()


def test_half_quadratic_makes_most_weights_nearer():
    torch.manual_seed(0)
    weight = torch.randn(64, 250) * (1 + 5 * (torch.rand(64, 250) > 0.98))
    for bits in (2, 3, 4):
        got = quantize_half_quadratic(weight, bits, 64)
        plain = quantize_groups(weight, bits, 64, symmetric=False, float_minimum=True)
        assert torch.equal(got.scale, plain.scale)
        size = got.scale.float().repeat_interleave(64, 1)[:, :250]
        ours, theirs = (((weight - q.dequantize()) / size).abs().pow(0.7) for q in (got, plain))
        assert ours.sum() < theirs.sum()
        groups = [slice(g, min(g + 64, 250)) for g in range(0, 250, 64)]
        assert all((ours[:, g].sum(1) <= theirs[:, g].sum(1) * (1 + 1e-5)).all() for g in groups)


def test_half_quadratic_bears_a_group_of_equal_weights():
    got = quantize_half_quadratic(torch.full((2, 64), 0.25), 4, 32)
    assert torch.equal(got.dequantize(), torch.full((2, 64), 0.25))


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_models_layers_hold_the_values_of_their_codes(method, ours):
    theirs, token_ids = shaken("llama"), torch.randint(0, 320, (4, 16))
    model = Transformer.from_transformers(theirs) if ours else theirs
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantized = quantize_layers(model, method, 4, 16, token_ids, symmetric=method != "gptq")
    assert len(quantized) == (12 if ours else 21)
    for name, q in quantized.items():
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(weight, q.dequantize()), name
        assert q.scheme.bits == 4
        assert not torch.equal(weight, before[f"{name}.weight"])
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in quantized and not ("norm" in name and "awq" in method):
            bias_of_a_producer = "bias" in name and "awq" in method
            assert bias_of_a_producer or torch.equal(parameter, before[name]), name


class Seen(Exception):
    """Enough blocks have been visited."""


def test_real_layers_lose_less_than_by_rounding():
    """A block of a real model on real text: GPTQ, clipping and AWQ's scales each lose less at every layer's outputs."""
    model, tokenizer = load_model("smollm2-135m", "cpu")
    won = []

    def visit(name, block, statistics):
        for inner, seen in statistics.items():
            weight, H = block.get_parameter(f"{inner}.weight"), seen.hessian

            def loss(values, weight=weight, H=H):
                return float((((weight - values) @ H) * (weight - values)).sum())

            rounded = loss(quantize_groups(weight, 3, 64).dequantize())
            s = search_scales(weight, seen.mean_abs, H, 3)
            found = clipped_grid(weight, H, 3)
            won.append({
                "gptq": loss(gptq_quantize(weight, H, 3).dequantize()) / rounded,
                "awq": loss(quantize_groups(weight * s, 3, 64).dequantize() / s) / rounded,
                "clipped": loss(values_on(round_to(weight, found), found)) / rounded,
            })  # fmt: skip
        raise Seen

    with pytest.raises(Seen):
        visit_blocks(model, calibration_windows(tokenizer, windows=1, length=128), visit)
    assert len(won) == 7
    for method, most in (("gptq", 0.9), ("awq", 1.0), ("clipped", 0.9)):
        assert max(row[method] for row in won) <= most * (1 + 1e-5), (method, won)


def test_methods_that_need_text_or_known_parts_say_so():
    model = shaken("llama")
    with pytest.raises(ValueError, match="token_ids: method 'gptq' needs calibration text"):
        quantize_layers(model, "gptq")
    with pytest.raises(ValueError, match="method: expected one of"):
        quantize_layers(model, "gtpq")
    model.config.model_type = "gemma3"
    with pytest.raises(ValueError, match=r"model: scales can be folded into .*, got gemma3"):
        quantize_layers(model, "awq", token_ids=torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: awq_scales(torch.ones(2, 3), torch.ones(4, 5)), "inputs: expected 3 channels, got 5"),
        (lambda: smooth_scales(torch.ones(4), torch.ones(2, 3)), "activation_absmax: expected 3 channels, got 4"),
        (lambda: smooth_scales(-torch.ones(3), torch.ones(2, 3)), "activation_absmax: expected no negative"),
        (lambda: smooth_scales(torch.ones(3), torch.ones(2, 3), 1.5), "alpha: expected"),
        (lambda: quantize_half_quadratic(torch.ones(2, 3), power=2.0), "power: expected"),
        (lambda: quantize_half_quadratic(torch.full((2, 3), float("nan"))), "weight: expected finite"),
    ],
)
def test_wrong_arguments_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
