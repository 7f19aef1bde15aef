"""Gradients pass straight through rounding inside the range; QAT and QLoRA train what they should and nothing else."""

import copy

import pytest
import torch
from test_calibration import shaken
from torch import nn
from torch.nn import functional as F

from llmlab.model import Transformer
from llmlab.quantization.fake import FakeQuantizedWeight, fake_quantize, finish_qat, prepare_qat
from llmlab.quantization.integer import grid, quantize_groups
from llmlab.quantization.linear import QuantizedLinear
from llmlab.quantization.models import hold_quantized, quantize_model
from llmlab.quantization.qlora import LoRALinear, add_lora, merge_lora
from llmlab.quantization.training import next_token_loss, teacher_loss, train


def test_gradients_are_one_inside_the_range_and_zero_outside():
    # at 3 bits and scale 0.5 the codes -4 to 3 reach from -2 to 1.5, and what rounds there from -2.25 to 1.75
    x = torch.tensor([-3.0, -2.3, -2.2, -0.7, 0.0, 0.24, 1.7, 1.8, 50.0], requires_grad=True)
    y = fake_quantize(x, 0.5, bits=3)
    assert y.tolist() == [-2.0, -2.0, -2.0, -0.5, 0.0, 0.0, 1.5, 1.5, 1.5]
    y.backward(torch.arange(1.0, 10.0))
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0]


@pytest.mark.parametrize("zero", [None, 5])
@pytest.mark.parametrize("bits", [3, 8])
def test_values_and_gradients_are_torchs(bits, zero):
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zero is None else (0, 2**bits - 1)
    ours, theirs = (torch.randn(7, 50).mul(3).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    upstream = torch.randn(7, 50)
    got = fake_quantize(ours, 0.25, zero, bits)
    expected = torch.fake_quantize_per_tensor_affine(theirs, 0.25, zero or 0, lowest, highest)
    assert torch.equal(got, expected)
    got.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    if bits == 3:
        assert 0 < int((ours.grad == 0).sum()) < 350


@pytest.mark.parametrize("zero", [0, 3])
def test_the_scales_gradient_is_that_of_learned_steps(zero):
    x, upstream = torch.randn(6, 40) * 2, torch.randn(6, 40)
    scale = torch.full((6, 1), 0.3).requires_grad_()
    fake_quantize(x, scale, torch.full((6, 1), zero), 3).backward(upstream)
    for row in range(6):
        theirs = torch.tensor([0.3], requires_grad=True)
        torch._fake_quantize_learnable_per_tensor_affine(
            x[row], theirs, torch.tensor([float(zero)]), 0, 7, 1.0
        ).backward(upstream[row])
        assert torch.allclose(scale.grad[row], theirs.grad, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_rounded_weight_is_what_is_stored(symmetric):
    weight = torch.randn(8, 100)
    weight[2, :32] = 0
    held = FakeQuantizedWeight(grid(weight, 3, 32, symmetric))
    assert torch.equal(held(weight), held.quantized(weight).dequantize())
    expected = quantize_groups(weight, 3, 32, symmetric)
    assert torch.allclose(held(weight), expected.dequantize())
    with torch.no_grad():
        held.scale.mul_(0.777)
    assert torch.equal(held(weight), held.quantized(weight).dequantize())


def mean_loss(model, token_ids, teacher):
    with torch.no_grad():
        return float(teacher_loss(teacher)(model, token_ids))


def test_qat_wins_back_what_rounding_loses():
    teacher, token_ids = shaken("llama"), torch.randint(0, 320, (16, 12), generator=torch.Generator().manual_seed(3))
    model = copy.deepcopy(teacher)
    before = {name: p.clone() for name, p in model.named_parameters()}
    prepare_qat(model, 2, 16)
    rounded = mean_loss(model, token_ids, teacher)
    losses = train(model, token_ids, teacher_loss(teacher), steps=60, batch_size=8, learning_rate=3e-3)
    quantized = finish_qat(model)
    after = mean_loss(model, token_ids, teacher)
    assert len(losses) == 60
    assert losses[0] == pytest.approx(rounded, rel=0.3)
    assert after < 0.6 * rounded
    assert len(quantized) == 21
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in quantized:
            q = quantized[name.removesuffix(".weight")]
            assert torch.equal(parameter, q.dequantize())
            assert int(q.codes.min()) >= -2
            assert int(q.codes.max()) <= 1
            assert q.scale.dtype == torch.float16
        else:
            assert torch.equal(parameter, before[name]), name
    with torch.no_grad():
        expected = model(token_ids).logits
        assert torch.equal(hold_quantized(model, quantized)(token_ids).logits, expected)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 21


def test_only_layers_of_the_model_can_hold_quantized_weights():
    model = shaken("llama")
    q = quantize_groups(model.model.layers[0].mlp.up_proj.weight, 4, 16)
    for wrong, says in (
        ({"model.layers.9.mlp.up_proj": q}, "names of linear layers, got 'model.layers.9.mlp.up_proj'"),
        ({"model.layers.0.mlp.up_proj": q, "model.layers.0.mlp.down_proj": q}, "for 'model.layers.0.mlp.down_proj'"),
    ):
        with pytest.raises(ValueError, match=says):
            hold_quantized(model, wrong)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_qat_may_start_from_clipped_grids_and_works_on_our_decoder():
    theirs, token_ids = shaken("llama"), torch.randint(0, 320, (4, 12))
    model = Transformer.from_transformers(theirs)
    prepare_qat(model, 3, 16, symmetric=False, token_ids=token_ids)
    quantized = finish_qat(model)
    plain = quantize_groups(Transformer.from_transformers(theirs).layers[0].down.weight, 3, 16, symmetric=False)
    assert len(quantized) == 12
    assert (quantized["layers.0.down"].scale <= plain.scale).all()
    assert (quantized["layers.0.down"].scale < plain.scale).any()


def test_a_model_that_was_not_prepared_cannot_be_finished():
    with pytest.raises(ValueError, match="model: expected one that prepare_qat has prepared"):
        finish_qat(shaken("llama"))
    with pytest.raises(ValueError, match="found: expected a symmetric grid or integer zero points"):
        FakeQuantizedWeight(grid(torch.randn(2, 8), 4, 8, symmetric=False, float_minimum=True))


def lora_layer(rank=4):
    torch.manual_seed(0)
    layer = LoRALinear(quantize_groups(torch.randn(24, 40), 4, 8), rank, 8.0, torch.randn(24))
    with torch.no_grad():
        layer.B.normal_()
    return layer


def test_the_corrected_layer_is_the_sum_and_its_gradients_are_autograds():
    layer, x = lora_layer(), torch.randn(5, 40, requires_grad=True)
    plain_x = x.detach().clone().requires_grad_()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    expected = F.linear(plain_x, layer.base.dequantize() + 8.0 / 4 * B @ A, layer.bias)
    got, upstream = layer(x), torch.randn(5, 24)
    assert torch.allclose(got, expected, atol=1e-5)
    got.backward(upstream)
    expected.backward(upstream)
    for ours, theirs in ((x.grad, plain_x.grad), (layer.A.grad, A.grad), (layer.B.grad, B.grad)):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}


def test_no_weight_in_full_precision_is_held_between_the_passes():
    """What autograd saves is smaller than the dequantized weight."""
    saved = []
    layer, x = LoRALinear(quantize_groups(torch.randn(256, 256), 4, 64), 2), torch.randn(3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sum(saved) < 256 * 256 / 4


def test_merging_gives_the_same_outputs_from_an_ordinary_layer():
    layer, x = lora_layer(), torch.randn(5, 40)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    assert torch.allclose(merged(x), layer(x), atol=1e-5)


def test_finetuning_a_frozen_model_moves_the_corrections_only():
    model = shaken("llama")
    token_ids = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    with torch.no_grad():
        rounded = copy.deepcopy(model)
        for module in rounded.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(quantize_groups(module.weight, 4, 16).dequantize())
    quantize_model(model, "round", 4, 16)
    names = add_lora(model, rank=4)
    with torch.no_grad():
        assert torch.allclose(model(token_ids).logits, rounded(token_ids).logits, atol=1e-4)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if ".base." in name}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(codes) == 42  # packed codes and scales
    assert len(names) == 21
    assert len(trained) == 42
    assert all(name.endswith((".A", ".B")) for name in trained)
    losses = train(model, token_ids, steps=40, batch_size=8, learning_rate=1e-2)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    for name, buffer in model.named_buffers():
        if name in codes:
            assert torch.equal(buffer, codes[name]), name
    with torch.no_grad():
        expected = model(token_ids).logits
        assert merge_lora(model) == 21
        assert torch.allclose(model(token_ids).logits, expected, atol=1e-3)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_only_the_named_layers_are_taken():
    model = quantize_model(shaken("llama"), "nf4", group_size=16)
    with pytest.raises(ValueError, match=r"model: expected quantized linear layers named \['qkv'\], got none"):
        add_lora(model, targets=["qkv"])
    assert any(p.requires_grad for p in model.parameters())
    names = add_lora(model, 2, targets=["q_proj", "v_proj"])
    assert len(names) == 6
    assert all(name.endswith(("q_proj", "v_proj")) for name in names)
    with pytest.raises(
        ValueError, match="model: expected quantized linear layers, got none; quantize_model makes them"
    ):
        add_lora(shaken("llama"))


def test_the_next_tokens_loss_is_transformers():
    model, token_ids = shaken("llama"), torch.randint(0, 320, (3, 12))
    with torch.no_grad():
        expected = model(token_ids, labels=token_ids).loss
        assert torch.allclose(next_token_loss(model, token_ids), expected, atol=1e-5)
        assert mean_loss(model, token_ids, model) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: fake_quantize(torch.ones(3, dtype=torch.int32), 1.0), TypeError, "x: expected a tensor of floats"),
        (lambda: fake_quantize(torch.ones(3), 0.0), ValueError, "scale: expected positive"),
        (lambda: fake_quantize(torch.ones(3), 1.0, bits=1), ValueError, "bits: expected one of"),
        (lambda: LoRALinear(quantize_groups(torch.ones(4, 8)), 5), ValueError, "rank: expected at most 4"),
        (lambda: LoRALinear(quantize_groups(torch.ones(4, 8)), 0), ValueError, "rank: expected"),
        (lambda: LoRALinear(quantize_groups(torch.ones(4, 8)), 2, -1.0), ValueError, "alpha: expected"),
        (
            lambda: train(nn.Linear(2, 2).requires_grad_(False), torch.zeros(4, 2)),
            ValueError,
            "model: expected parameters",
        ),
        (lambda: train(nn.Linear(2, 2), torch.zeros(1, 2)), ValueError, "token_ids: expected at least 2 windows"),
        (
            lambda: train(nn.Linear(2, 2), torch.zeros(4, 2), lambda m, t: m(t).sum() * float("nan")),
            ValueError,
            "loss: expected a finite loss",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
