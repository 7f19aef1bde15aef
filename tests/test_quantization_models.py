"""Quantized layers and models: what they compute, what they leave alone, and that they come back from a folder as they were."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from test_model import KINDS, SMALL, shaken, stepwise_logits
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llmlab.checkpoint import load_model
from llmlab.model import Transformer
from llmlab.quantization import (
    METHODS,
    Float8Linear,
    Int8Linear,
    QuantizedLinear,
    load_quantized,
    model_bytes,
    quantize_absmax,
    quantize_fp4,
    quantize_fp8,
    quantize_groups,
    quantize_model,
    quantize_nf4,
    quantize_zero_point,
    save_quantized,
)
from llmlab.quantization.layout import kernel_weight, multiply
from llmlab.quantization.linear import int8_linear

CALIBRATED = [name for name, method in METHODS.items() if method.solve is not None]
PLAIN = [name for name in METHODS if name not in CALIBRATED]
INPUTS_ROUNDED = ["fp8", "int8", "llm.int8", "smooth"]
TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(1))


def small_model(seed=0, tied=True, **changes):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | changes, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def quantized_model(method, model=None, **options):
    calibration = TOKENS if method in CALIBRATED else None
    return quantize_model(small_model() if model is None else model, method, calibration=calibration, **options)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "quantize",
    [
        quantize_groups,
        lambda w: quantize_groups(w, 3, 20, False),
        quantize_nf4,
        quantize_absmax,
        quantize_zero_point,
        quantize_fp8,
    ],
)
def test_a_layer_multiplies_by_its_values(quantize, dtype):
    w, bias, x = torch.randn(30, 50).to(dtype), torch.randn(30).to(dtype), torch.randn(2, 5, 50).to(dtype)
    q = quantize(w)
    layer = QuantizedLinear(q, bias)
    assert torch.equal(layer(x), F.linear(x, q.dequantize(), bias))
    assert torch.equal(layer.weight, q.dequantize())
    assert layer.num_bytes == q.num_bytes + 30 * dtype.itemsize
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kind", ["weight only", "int8", "fp8"])
def test_an_input_scale_divides_the_inputs(kind):
    w, x, s = torch.randn(30, 50), torch.randn(7, 50), torch.rand(50) + 0.5
    if kind == "int8":
        linear = nn.Linear(50, 30)
        w, bias = linear.weight.detach(), linear.bias.detach()
        layer, plain = (
            int8_linear(linear, input_scale=s),
            Int8Linear(quantize_absmax(w * s, granularity="channel"), bias),
        )
    elif kind == "fp8":
        q = quantize_fp8(w * s, granularity="row")
        layer, plain, bias = Float8Linear(q, None, s), Float8Linear(q), 0
    else:
        q = quantize_groups(w * s, 8)
        layer, plain, bias = QuantizedLinear(q, None, s), QuantizedLinear(q), 0
    assert torch.equal(layer(x), plain(x / s))
    error = layer(x) - F.linear(x, w) - bias
    assert float(error.norm() / F.linear(x, w).norm()) < 0.06
    assert float((layer.weight - w).abs().max()) < (0.2 if kind == "fp8" else 0.05)


def test_inputs_are_rounded_token_by_token():
    """By hand in fp64: a token with large values takes nothing from its neighbours."""
    w, x = torch.randn(30, 50), torch.randn(2, 6, 50)
    x[0, 2] *= 1000
    weight = quantize_absmax(w, granularity="channel")
    rows = x.double().flatten(0, 1)
    s = rows.abs().amax(1, keepdim=True) / 127
    expected = ((rows / s).round() * s) @ (weight.codes.double() * weight.scale).t()
    assert torch.allclose(Int8Linear(weight)(x).flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)
    fp8 = quantize_fp8(w, granularity="row")
    s = rows.abs().amax(1, keepdim=True) / 448
    expected = ((rows / s).float().to(torch.float8_e4m3fn).double() * s) @ fp8.dequantize().double().t()
    assert torch.allclose(Float8Linear(fp8)(x).flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [*INPUTS_ROUNDED[:3], "round", "nf4"])
def test_no_tokens_and_a_token_of_zeros(method):
    model = quantize_model(nn.Sequential(nn.Linear(64, 32)), method)
    assert model(torch.zeros(0, 64)).shape == (0, 32)
    assert model(torch.zeros(2, 0, 64)).shape == (2, 0, 32)
    assert torch.equal(model(torch.zeros(3, 64)), model[0].bias.expand(3, 32))


@pytest.mark.parametrize("quantize", [quantize_groups, quantize_nf4, quantize_absmax, quantize_fp8])
def test_another_dtype_leaves_codes_and_scales(quantize):
    layer = QuantizedLinear(quantize(torch.randn(32, 64)), torch.randn(32), torch.rand(64) + 1)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    layer.bfloat16()
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert (
            torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
            if tensor.dim()
            else tensor == before[name]
        )
    assert (
        layer.bias.dtype
        == layer.weight.dtype
        == layer(torch.randn(3, 64, dtype=torch.bfloat16)).dtype
        == torch.bfloat16
    )


KERNEL_FORMATS = {
    "int4": lambda w: quantize_groups(w, scale_dtype=torch.bfloat16),
    "int4 of 128": lambda w: quantize_groups(w, 4, 128, scale_dtype=torch.bfloat16),
    "int4 with zero points": lambda w: quantize_groups(w, 4, 64, False, scale_dtype=torch.bfloat16),
    "nf4": quantize_nf4,
    "nf4, scales whole": lambda w: quantize_nf4(w, 64, False),
    "fp4": quantize_fp4,
}


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_kernels_get_the_same_weight(name):
    """The twins of the kernels, given the layout, multiply by the values that the layer dequantizes."""
    q, x, bias = KERNEL_FORMATS[name](torch.randn(70, 384)), torch.randn(2, 3, 384), torch.randn(70)
    weight = kernel_weight(q)
    assert weight is not None
    assert torch.allclose(multiply(x, weight, bias), F.linear(x, q.dequantize(), bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "q",
    [
        quantize_groups(torch.randn(8, 96)), quantize_groups(torch.randn(8, 64), 3), quantize_groups(torch.randn(8, 64), 4, 32),
        quantize_groups(torch.randn(8, 64), 4, 64, False, True), quantize_nf4(torch.randn(8, 96)), quantize_nf4(torch.randn(8, 64), 32),
        quantize_absmax(torch.randn(8, 64)), quantize_nf4(torch.randn(64)),
    ],
)  # fmt: skip
def test_formats_without_a_kernel(q):
    assert kernel_weight(q) is None


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_computes_what_a_cpu_does(method):
    model = quantized_model(method, small_model().bfloat16(), group_size=64)
    expected = logits(model)
    model.cuda()
    with torch.no_grad():
        found = model(TOKENS.cuda()).logits.cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_layers_refuse():
    with pytest.raises(TypeError, match="quantized: expected a quantized tensor, got Tensor"):
        QuantizedLinear(torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"bias: expected the shape \(4,\), got \(3,\)"):
        QuantizedLinear(quantize_absmax(torch.randn(4, 3)), torch.zeros(3))
    with pytest.raises(ValueError, match=r"input_scale: expected the shape \(3,\), got \(4,\)"):
        QuantizedLinear(quantize_absmax(torch.randn(4, 3)), None, torch.ones(4))
    with pytest.raises(ValueError, match=r"quantized: expected a weight \[out, in\]"):
        QuantizedLinear(quantize_absmax(torch.randn(4)))
    with pytest.raises(ValueError, match="quantized: expected symmetric int8"):
        Int8Linear(quantize_groups(torch.randn(4, 4)))
    with pytest.raises(ValueError, match="quantized: expected a scale for each channel, got 'tensor'"):
        Int8Linear(quantize_absmax(torch.randn(4, 4)))
    for other in (
        quantize_absmax(torch.randn(4, 4)),
        quantize_fp8(torch.randn(4, 4)),
        quantize_nf4(torch.randn(4, 64)),
    ):
        with pytest.raises(ValueError, match="quantized: expected FP8 with a scale for each row"):
            Float8Linear(other)
    with pytest.raises(ValueError, match="threshold: expected a positive number"):
        Int8Linear(quantize_absmax(torch.randn(4, 4), granularity="channel"), threshold=0)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("method", METHODS)
def test_linear_layers_are_replaced_and_nothing_else(method):
    model = small_model()
    before = dict(model.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    assert quantized_model(method, model, group_size=32) is model
    linear = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(linear) == 3 * 7
    assert model.lm_head.weight is model.model.embed_tokens.weight is before["model.embed_tokens.weight"]
    kept = dict(model.named_parameters())
    assert set(kept) == {name for name in before if "proj" not in name}
    if method not in ("awq", "awq+gptq", "smooth"):  # which fold their scales into the norms
        assert all(torch.equal(kept[name], values[name]) for name in kept)
    assert all(isinstance(model.get_submodule(name), Int8Linear) for name in linear) == (
        method in ("int8", "llm.int8", "smooth")
    )


@pytest.mark.parametrize("method", [name for name in METHODS if name not in INPUTS_ROUNDED])
def test_a_model_computes_with_its_values(method):
    """The same logits as the model whose weights are overwritten by the values that the codes stand for."""
    model = quantized_model(method, group_size=32)
    plain = small_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            parameter.copy_(owner.weight)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].bits[0] == 8])
def test_eight_bits_are_near(method):
    exact = logits(small_model())
    error = float((logits(quantized_model(method)) - exact).norm() / exact.norm())
    assert error < (0.12 if method == "fp8" else 0.04)


@pytest.mark.parametrize("method", PLAIN)
def test_our_decoder_and_theirs_agree(method):
    """Rows and groups do not mind that q, k and v are one matrix; whole tensors would."""
    options = {"double_quantization": False} if method in ("nf4", "fp4") else {}
    theirs = small_model()
    ours = Transformer.from_transformers(theirs)
    quantized_model(method, theirs, group_size=32, **options)
    quantize_model(ours, method, group_size=32, **options)
    token_ids = TOKENS[0]
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0]
    assert torch.allclose(
        stepwise_logits(ours, token_ids, [10, 11, 12]),
        expected,
        rtol=1e-3,
        atol=0.05 if method in INPUTS_ROUNDED else 1e-3,
    )
    assert sum(isinstance(m, QuantizedLinear) for m in ours.modules()) == 3 * 4


@pytest.mark.parametrize("method", ["gptq", "awq", "smooth"])
def test_our_decoder_is_calibrated(method):
    theirs = small_model()
    ours = quantized_model(method, Transformer.from_transformers(theirs), group_size=32)
    with torch.no_grad():
        exact = theirs(TOKENS[0][None]).logits[0]
    error = (stepwise_logits(ours, TOKENS[0], [12]) - exact).norm() / exact.norm()
    assert float(error) < 0.3


def test_the_head_is_quantized_when_asked():
    model = quantize_model(small_model(), "absmax", head=True)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    untied = quantize_model(small_model(tied=False), "absmax")
    assert type(untied.lm_head) is nn.Linear
    ours = quantize_model(Transformer.from_transformers(small_model()), "absmax", head=True)
    assert torch.allclose(stepwise_logits(ours, TOKENS[0], []), model(TOKENS[:1]).logits[0], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decoder", ["theirs", "ours"])
def test_an_error_leaves_the_model_as_it_was(method, decoder):
    """A NaN in the last layer is met when all others are done."""
    model = small_model() if decoder == "theirs" else Transformer.from_transformers(small_model())
    last = (model.model.layers[-1].mlp.down_proj if decoder == "theirs" else model.layers[-1].down).weight
    with torch.no_grad():
        last[3, 5] = float("nan")
    modules, tensors = list(model.modules()), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaN"):
        quantized_model(method, model, group_size=32)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(
        torch.equal(t, tensors[name]) or name.endswith(("down_proj.weight", "down.weight"))
        for name, t in model.state_dict().items()
    )
    with torch.no_grad():
        last[3, 5] = 0.0
    quantized_model(method, model, group_size=32)


def test_an_error_names_the_layer():
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"model: layer 'model\.layers\.1\.mlp\.up_proj': weight: expected finite values"
    ):
        quantize_model(model, "round")


def pruned_model():
    """Two thirds of the weights zero, and one block with fewer neurons than the others."""
    model = small_model()
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= torch.rand_like(module.weight) < 1 / 3
        mlp = model.model.layers[1].mlp
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
            _part(mlp.gate_proj, slice(61), slice(None)), _part(mlp.up_proj, slice(61), slice(None)), _part(mlp.down_proj, slice(None), slice(61))
        )  # fmt: skip
    return model


def _part(linear, rows, columns):
    weight = linear.weight[rows, columns].clone()
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    part.weight = nn.Parameter(weight)
    return part


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_model_stays_pruned(method):
    model = pruned_model()
    zeros = {name: p == 0 for name, p in model.named_parameters() if "proj" in name}
    exact = logits(model)
    quantized_model(method, model, group_size=32)
    assert float((logits(model) - exact).norm() / exact.norm()) < 0.4
    if method == "half_quadratic":  # whose grid need not hold 0
        return
    for name, zero in zeros.items():
        assert bool((model.get_submodule(name.removesuffix(".weight")).weight[zero] == 0).all())


def test_any_module_with_linear_layers():
    model = nn.Sequential(nn.Linear(37, 53), nn.ReLU(), nn.Linear(53, 10, bias=False))
    shared = nn.ModuleDict({"a": model[0], "b": model[0]})
    x = torch.randn(4, 37)
    exact = model(x).detach()
    assert float((quantize_model(copy.deepcopy(model), "absmax")(x) - exact).detach().abs().max()) < 0.05
    quantize_model(shared, "nf4", group_size=64)
    assert shared["a"] is shared["b"]


def test_wrong_arguments_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match=r"method: expected one of .*, got 'rounded'; did you mean 'round'"):
        quantize_model(model, "rounded")
    with pytest.raises(ValueError, match="bits: expected one of 4 for 'nf4', got 3"):
        quantize_model(model, "nf4", 3)
    with pytest.raises(ValueError, match="bits: expected one of 4, 8"):
        quantize_model(model, "round", 1)
    with pytest.raises(ValueError, match="group_size: expected a whole number of at least 1, got 0"):
        quantize_model(model, "round", 4, 0)
    with pytest.raises(ValueError, match=r"calibration: expected token ids \[windows, S\] for 'gptq', got NoneType"):
        quantize_model(model, "gptq")
    with pytest.raises(
        ValueError, match="calibration: expected None, since nothing is calibrated, for 'round', got Tensor"
    ):
        quantize_model(model, "round", calibration=TOKENS)
    with pytest.raises(TypeError, match=r"options: expected fields of Settings, got \['symetric'\]"):
        quantize_model(model, "round", symetric=False)
    with pytest.raises(ValueError, match="float_minimum: expected False where symmetric is True"):
        quantize_model(model, "round", float_minimum=True)
    with pytest.raises(TypeError, match="model: expected a Module, got str"):
        quantize_model("smollm2-135m", "round")
    for empty in (nn.ReLU(), nn.Linear(3, 4), quantize_model(small_model(), "round")):
        with pytest.raises(ValueError, match="model: expected a model that holds linear layers"):
            quantize_model(empty, "round")
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_the_packaged_model_is_reproduced_exactly():
    """Its file is int4 in groups of 32 with a minimum, so that very grid finds every weight again; groups of 64 do not."""
    model, _ = load_model(device="cpu")
    linear = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    assert len(linear) == 210
    for name, weight in list(linear.items())[::9]:
        assert torch.equal(quantize_groups(weight, 4, 32, False, True).dequantize(), weight), name
        assert not torch.equal(quantize_groups(weight, 4, 64, False, True).dequantize(), weight)


# ---------------------------------------------------------------- folders


def stored_bytes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(t.numel() * t.element_size() for t in map(file.get_tensor, file.keys()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decoder", ["theirs", "ours"])
def test_a_folder_gives_the_same_logits(tmp_path, method, decoder):
    model = small_model() if decoder == "theirs" else Transformer.from_transformers(small_model())
    quantized_model(method, model, group_size=32)
    folder = save_quantized(model, tmp_path / "model")
    loaded = load_quantized(folder)
    assert type(loaded) is type(model)
    run = logits if decoder == "theirs" else lambda m: stepwise_logits(m, TOKENS[0], [7, 8])
    assert torch.equal(run(loaded), run(model))
    assert stored_bytes(folder) == model_bytes(model) == model_bytes(loaded)
    head, embedding = (
        (loaded.lm_head, loaded.model.embed_tokens) if decoder == "theirs" else (loaded.head, loaded.embedding)
    )
    assert head.weight is embedding.weight
    assert sum(f.stat().st_size for f in folder.iterdir()) < model_bytes(model) + 60_000  # the headers
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}


def test_a_model_in_fewer_bytes():
    """Weights of 4 bits and scales of 16 for 64; the rest as it was in fp32."""
    model = small_model()
    rest = sum(p.numel() for name, p in model.named_parameters() if "proj" not in name)
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert model_bytes(model) == 4 * (linear + rest)
    columns = (
        3 * (64 * (64 * 2 + 32 * 2) + 96 * 64 * 2),
        3 * 64 * 96,
    )  # inputs of 64 channels, and of 96: two groups, the second of 32
    assert sum(columns) == linear
    assert (
        model_bytes(quantize_model(model, "round"))
        == 4 * rest + linear // 2 + columns[0] // 64 * 2 + columns[1] // 96 * 4
    )


def test_bf16_and_generation_settings_come_back(tmp_path):
    model = small_model()
    for parameter in model.parameters():  # and not the table of rotary positions, which no file holds
        parameter.data = parameter.data.bfloat16()
    model.generation_config.max_new_tokens = 17
    quantize_model(model, "nf4", group_size=32)
    loaded = load_quantized(save_quantized(model, tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.max_new_tokens == 17
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_decoder_with_biases_and_stretched_positions_comes_back(tmp_path):
    ours = Transformer.from_transformers(shaken(KINDS["llama with biases and stretched positions"]()))
    quantize_model(ours, "round", group_size=32)
    loaded = load_quantized(save_quantized(ours, tmp_path / "model"))
    assert loaded.config == ours.config
    assert hash(loaded.config) == hash(ours.config)
    assert torch.equal(stepwise_logits(loaded, TOKENS[0], [5]), stepwise_logits(ours, TOKENS[0], [5]))


def test_a_pruned_model_comes_back(tmp_path):
    """The record tells the shapes of quantized layers, so a model with fewer neurons in a block needs no other config."""
    model = quantize_model(pruned_model(), "round", group_size=32)
    folder = save_quantized(model, tmp_path / "model")
    assert torch.equal(logits(load_quantized(folder)), logits(model))
    into = small_model(seed=5)
    assert load_quantized(folder, into) is into
    assert torch.equal(logits(into), logits(model))


def test_any_module_comes_back_into_one_like_it(tmp_path):
    model = nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 10))
    quantize_model(model, "round", 3, 16, symmetric=False)
    folder = save_quantized(model, tmp_path / "model")
    x = torch.randn(4, 37)
    with pytest.raises(ValueError, match="expected a model to load them into, got None"):
        load_quantized(folder)
    like = nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 10))
    assert torch.equal(load_quantized(folder, like)(x), model(x))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 10))
    assert torch.equal(load_quantized(folder, empty)(x), model(x))


def test_damaged_folders_are_refused(tmp_path):
    model = quantize_model(small_model(), "round", group_size=32)
    with pytest.raises(ValueError, match="holds no quantized model"):
        load_quantized(tmp_path / "nowhere")
    folder = save_quantized(model, tmp_path / "model")
    with pytest.raises(FileExistsError, match=r"folder: .* exists"):
        save_quantized(model, folder)
    with pytest.raises(ValueError, match="model: expected quantized layers, got LlamaForCausalLM without any"):
        save_quantized(small_model(), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    for like in (
        small_model(seed=3, num_hidden_layers=4),
        small_model(seed=3, num_hidden_layers=2),
        small_model(seed=3, vocab_size=100),
    ):
        modules, before = list(like.modules()), logits_or_none(like)
        with pytest.raises(ValueError, match="model: "):
            load_quantized(folder, like)
        assert all(a is b for a, b in zip(like.modules(), modules, strict=True))
        assert torch.equal(logits_or_none(like), before)
    record = (folder / "quantization.json").read_text()
    (folder / "quantization.json").write_text(json.dumps(json.loads(record) | {"format": 2}))
    with pytest.raises(ValueError, match=r"expected quantization\.json of format 1"):
        load_quantized(folder)
    broken = json.loads(record)
    broken["layers"]["model.layers.1.mlp.up_proj"]["tensor"].pop("bits")
    (folder / "quantization.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="lacks 'bits' for a quantized layer"):
        load_quantized(folder)
    (folder / "quantization.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match=r"expected quantization\.json of format 1"):
        load_quantized(folder)
    (folder / "quantization.json").write_text(record[:100])
    with pytest.raises(ValueError, match="holds no quantized model"):
        load_quantized(folder)
    (folder / "quantization.json").write_text(record)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="holds no quantized model"):
        load_quantized(folder)


@torch.no_grad()
def logits_or_none(model):
    return model(TOKENS % 100).logits


@pytest.mark.parametrize(
    "change", [{"kind": "pickle"}, {"class": "Linear"}, {"model": {"kind": "transformers", "class": "pipeline"}}]
)
def test_records_that_name_something_else_are_refused(tmp_path, change):
    folder = save_quantized(quantize_model(small_model(), "round", group_size=32), tmp_path / "model")
    record = json.loads((folder / "quantization.json").read_text())
    layer = record["layers"]["model.layers.0.mlp.up_proj"]
    if "kind" in change:
        layer["tensor"] |= change
    elif "class" in change:
        layer |= change
    else:
        record |= change
    (folder / "quantization.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"expected a (kind|class|model)"):
        load_quantized(folder)
