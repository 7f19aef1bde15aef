"""The memory formulas against accelerate, transformers, tensors that are counted, and published numbers."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import calculate_maximum_sizes
from hypothesis import given
from hypothesis import strategies as st

from llmlab.accounting import SavedForBackward, TensorAccounting, storage_bytes
from llmlab.checkpoint import empty_model, new_model
from llmlab.config import DTYPE_BYTES, MODEL_CONFIGS, ModelConfig
from llmlab.hardware import DEVICES, GB, DeviceSpec, GiB
from llmlab.memory import (
    RECIPES,
    activation_bytes,
    estimate,
    gpus_needed,
    kv_cache_bytes,
    kv_tokens_that_fit,
    num_parameters,
    parameter_counts,
    serving_bytes,
    training_bytes,
    training_peak_bytes,
)

SMALL = ModelConfig(
    "small", "llama", vocab_size=1024, hidden_size=96, intermediate_size=256, num_layers=3, num_heads=6,
    num_kv_heads=2, head_size=32, max_positions=512, tied_embeddings=True, rotary_size=32,
)  # fmt: skip
# The decoder of Korthikanti et al. 2022: LayerNorm, GELU, F = 4·D, dropout, as many key/value heads as query heads.
GPT = dataclasses.replace(MODEL_CONFIGS["opt-13b"], name="gpt", activation="gelu", attention_dropout=0.1)


def test_importing_the_formulas_brings_neither_torch_nor_numpy():
    code = "import sys, llmlab.memory, llmlab.config, llmlab.hardware; print({'torch', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt-j-6b", 6_050_882_784),
        ("llama-2-70b", 68_976_648_192),
        ("llama-13b", 13_015_864_320),
        ("phi-2", 2_779_683_840),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_parameter_counts_equal_the_published_ones(name, published):
    assert num_parameters(MODEL_CONFIGS[name]) == published


@pytest.mark.parametrize("name", sorted(MODEL_CONFIGS))
def test_estimate_agrees_with_accelerate_and_counts_tied_weights_once(name):
    """accelerate's total is of all parameters and buffers, with a tied head counted twice on the meta device."""
    config = MODEL_CONFIGS[name]
    module = empty_model(name)
    total, (largest, _) = calculate_maximum_sizes(module)
    ours, of_module = estimate(config, ["float32"])[0], estimate(module, ["float32"])[0]
    twice = 4 * config.vocab_size * config.hidden_size if config.tied_embeddings else 0
    assert of_module.total_bytes + twice == pytest.approx(total, rel=0.002)
    assert of_module.total_bytes + twice + of_module.buffer_bytes == total
    assert ours.total_bytes == of_module.total_bytes
    assert ours.largest_layer_bytes == of_module.largest_layer_bytes == pytest.approx(largest, rel=0.002)


@pytest.mark.parametrize(("name", "gib"), [("phi-2", 9.867), ("bert-base-cased", 0.4035)])
def test_the_base_model_is_what_accelerate_prints(name, gib):
    base = MODEL_CONFIGS[name].without_head()
    module = empty_model(name, head=False)
    assert num_parameters(base) == sum(p.numel() for p in module.parameters())
    assert estimate(base, ["float32"])[0].total_bytes / GiB == pytest.approx(gib, abs=5e-4)


def test_estimating_llama_2_70b_takes_no_memory():
    code = """
import resource, accelerate, transformers, torch
from transformers import AutoModelForCausalLM
from llmlab.checkpoint import empty_model
from llmlab.memory import estimate
empty_model("smollm2-135m")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = estimate(empty_model("llama-2-70b"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, int(rows[0].total_bytes))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, total = map(int, result.stdout.split())
    assert total == 4 * 68_976_648_192
    assert grown < 200e6


def test_estimate_takes_one_dtype_or_any_iterable():
    assert [r.dtype for r in estimate(SMALL, "float32")] == ["float32"]
    assert [r.dtype for r in estimate(SMALL, (d for d in ["int8", "int4"]))] == ["int8", "int4"]


def test_estimate_rows_follow_the_dtype():
    rows = {row.dtype: row for row in estimate(SMALL)}
    assert rows["float32"].total_bytes == 2 * rows["float16"].total_bytes == 8 * rows["int4"].total_bytes
    assert rows["float32"].training_bytes == 4 * rows["float32"].total_bytes
    assert rows["int8"].training_bytes is None


def test_serving_rule_of_thumb():
    assert [serving_bytes(70e9, bits) for bits in (16, 8, 4)] == pytest.approx([168e9, 84e9, 42e9])


def test_gpt_j_rounded_to_6_billion():
    held = training_bytes(6e9)
    assert (held.weights, held.gradients, held.optimizer, held.total) == (24 * GB, 24 * GB, 48 * GB, 96 * GB)
    assert training_bytes(6e9, "bf16-adam").total == 48 * GB


def test_gpt_j_exactly():
    exact = num_parameters(MODEL_CONFIGS["gpt-j-6b"])
    assert 4 * exact / GB == pytest.approx(24.20, abs=5e-3)
    assert 4 * exact / GiB == pytest.approx(22.54, abs=5e-3)
    assert training_bytes(exact).total / GB == pytest.approx(96.81, abs=5e-3)


def test_gpt_j_passes_200_gb_at_a_stated_batch():
    config = MODEL_CONFIGS["gpt-j-6b"]
    at_8 = training_bytes(num_parameters(config), activations=activation_bytes(config, 8, 2048, 4))
    at_4 = training_bytes(num_parameters(config), activations=activation_bytes(config, 4, 2048, 4))
    assert at_4.total < 200 * GB < at_8.total


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_training_states_equal_what_a_step_leaves(recipe):
    """Optimizers that torch has here are run; 8-bit and mixed recipes are added up from their definition."""
    P = num_parameters(SMALL)
    held = training_bytes(P, recipe)
    makers = {
        "fp32-adam": (torch.optim.AdamW, {}), "bf16-adam": (torch.optim.AdamW, {}), "fp32-sgd": (torch.optim.SGD, {}),
        "fp32-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    }  # fmt: skip
    if recipe not in makers:
        expected = {
            "mixed-adam": 16 * P,
            "fp32-adam8bit": 10 * P + 2 * 4 * -(-P // 256),
            "bf16-adam8bit": 6 * P + 2 * 4 * -(-P // 256),
        }
        assert held.total == expected[recipe]
        return
    model = new_model(SMALL, device="cpu", dtype=RECIPES[recipe].weights)
    maker, options = makers[recipe]
    optimizer = maker(model.parameters(), lr=1e-3, **options)
    _one_step(model, optimizer, 1, 8)
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    assert storage_bytes(model.parameters()) == held.weights
    assert storage_bytes(p.grad for p in model.parameters()) == held.gradients
    assert storage_bytes(states) == held.optimizer


def test_eight_bit_moments_take_what_bitsandbytes_takes():
    """bitsandbytes' own state of one large tensor: a byte a moment and a float32 for each block of 256."""
    import bitsandbytes

    weight = torch.nn.Parameter(torch.randn(512, 300))
    optimizer = bitsandbytes.optim.Adam8bit([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    measured = storage_bytes([state["state1"], state["state2"], state["absmax1"], state["absmax2"]])
    assert measured == training_bytes(weight.numel(), "fp32-adam8bit").optimizer


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_activations_are_those_of_korthikanti(ranks):
    """Table 2 of the paper, in its own letters: s, b, h, a, t, L."""
    s, b, h, a, t, L = 2048, 4, GPT.hidden_size, GPT.num_heads, ranks, GPT.num_layers
    score = 5 * a * s / h
    sizes = {
        (None, False): s * b * h * (10 + 24 / t + score / t),
        (None, True): s * b * h * (34 + score) / t,
        ("selective", False): s * b * h * (10 + 24 / t),
        ("selective", True): s * b * h * 34 / t,
        ("full", False): 2 * s * b * h,
    }
    for (recompute, sequence_parallel), layer in sizes.items():
        ours = activation_bytes(GPT, b, s, 2, recompute, False, t, sequence_parallel)
        assert ours == pytest.approx(L * layer, rel=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(name, dtype):
    """Each further layer of transformers' own model keeps the predicted bytes, up to the norms' statistics."""
    config = dataclasses.replace(SMALL, architecture=name, qk_norm=name == "qwen3")
    kept = []
    for layers in (1, 2):
        model = new_model(dataclasses.replace(config, num_layers=layers), device="cpu", dtype=dtype)
        tokens = torch.randint(config.vocab_size, (2, 64))
        with SavedForBackward(model.parameters()) as saved:
            model(input_ids=tokens, labels=tokens, use_cache=False)
        kept.append(saved.num_bytes)
    statistics = 4 * 2 + (4 * 8 if name == "qwen3" else 0)
    layer = activation_bytes(dataclasses.replace(config, num_layers=1), 2, 64, int(DTYPE_BYTES[dtype]))
    assert kept[1] - kept[0] == layer + 2 * 64 * statistics


def test_activations_of_a_gpt_block_are_what_autograd_keeps():
    """The paper's block in plain torch without dropout: LayerNorm, attention weights kept, GELU."""
    D, H, S, B = 64, 4, 32, 2
    config = dataclasses.replace(
        GPT, hidden_size=D, num_heads=H, num_kv_heads=H, head_size=D // H, intermediate_size=4 * D, num_layers=1,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    nn = torch.nn
    norm1, norm2, out = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, D)
    qkv, up, down = nn.ModuleList(nn.Linear(D, D) for _ in range(3)), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
    x = torch.randn(B, S, D, requires_grad=True)
    parameters = [p for m in (norm1, norm2, out, qkv, up, down) for p in m.parameters()]
    with SavedForBackward(parameters) as saved:
        a = norm1(x)
        q, k, v = (linear(a).view(B, S, H, D // H).transpose(1, 2) for linear in qkv)
        weights = torch.softmax(torch.einsum("bhsd,bhtd->bhst", q, k), -1)
        y = x + out(torch.einsum("bhst,bhtd->bshd", weights, v).reshape(B, S, D))
        loss = y + down(nn.functional.gelu(up(norm2(y))))
    statistics = 2 * 2 * 4 * B * S  # mean and deviation of two norms
    predicted = activation_bytes(config, B, S, 4, flash=False)
    assert loss.shape == (B, S, D)
    assert saved.num_bytes == pytest.approx(predicted + statistics, rel=0.02)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its heir is not in 5.17
@pytest.mark.parametrize(("batch", "sequence"), [(1, 16), (2, 64), (4, 128), (8, 256)])
@pytest.mark.parametrize("recipe", ["fp32-adam", "bf16-adam"])
@pytest.mark.parametrize(("tied", "recompute"), [(True, None), (False, None), (True, "full")])
def test_peak_of_a_training_step(batch, sequence, recipe, tied, recompute):
    """Every tensor of a real step is counted; the prediction is within 1 %."""
    config = dataclasses.replace(SMALL, tied_embeddings=tied, vocab_size=4096)
    model = new_model(config, device="cpu", dtype=RECIPES[recipe].weights)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    _one_step(model, optimizer, batch, sequence)
    optimizer.zero_grad(set_to_none=True)
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    with TensorAccounting() as accounting:
        accounting.count([*model.parameters(), *states])
        _one_step(model, optimizer, batch, sequence)
    assert training_peak_bytes(config, batch, sequence, recipe, recompute) == pytest.approx(
        accounting.peak_bytes, rel=0.01
    )


@pytest.mark.parametrize("name", ["llama-13b", "llama-2-70b", "smollm2-135m"])
def test_kv_cache_of_a_token(name):
    per_token = {"llama-13b": 819_200, "llama-2-70b": 327_680, "smollm2-135m": 23_040}
    assert kv_cache_bytes(MODEL_CONFIGS[name], 1) == per_token[name]
    assert kv_cache_bytes(MODEL_CONFIGS["llama-13b"], 2048) == 1_677_721_600


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_cache_to_the_byte_of_its_tensors(dtype):
    model = new_model(SMALL, device="cpu", dtype=dtype).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.randint(SMALL.vocab_size, (3, 17)), use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert kv_cache_bytes(SMALL, 3 * 17, DTYPE_BYTES[dtype]) == sum(t.numel() * t.element_size() for t in tensors)


def test_the_puzzle_of_two_a100():
    """168 GB do not fit on 2 x 80 GB and do on 2 x 80 GiB; the exact weights leave room for about 50,000 tokens."""
    as_sold = DeviceSpec("80-GB", 80 * GB, 2e12, (), 0.0)
    assert gpus_needed(168 * GB, as_sold) == 3
    assert gpus_needed(168 * GB, "a100-80gb") == 2
    assert 2 * DEVICES["a100-80gb"].memory_bytes / GB == pytest.approx(171.8, abs=0.05)
    assert kv_tokens_that_fit(MODEL_CONFIGS["llama-2-70b"], "a100-80gb", 2) == pytest.approx(50_000, rel=0.05)
    assert kv_tokens_that_fit(MODEL_CONFIGS["llama-2-70b"], "a100-80gb", 1) == 0


@given(
    num_bytes=st.integers(1, 10**15),
    gib=st.integers(1, 500),
    fraction=st.floats(0.05, 1.0),
)
def test_gpus_needed_is_the_least_number_that_holds(num_bytes, gib, fraction):
    device = DeviceSpec("drawn", gib * GiB, 1e12, (), 0.0)
    count = gpus_needed(num_bytes, device, fraction)
    usable = device.memory_bytes * fraction
    assert count * usable >= num_bytes * (1 - 1e-12)
    assert (count - 1) * usable < num_bytes


@given(st.integers(1, 64), st.integers(1, 4096))
def test_activations_grow_with_tokens_and_recomputation_shrinks_them(batch, sequence):
    kept = [activation_bytes(SMALL, batch, sequence, 2, r, flash=False) for r in (None, "selective", "full")]
    assert kept[0] > kept[1] > kept[2] > 0
    assert activation_bytes(SMALL, 2 * batch, sequence) == 2 * activation_bytes(SMALL, batch, sequence)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: serving_bytes(0, 16), "num_params"),
        (lambda: serving_bytes(-1, 16), "num_params"),
        (lambda: serving_bytes(float("nan"), 16), "num_params"),
        (lambda: serving_bytes(10**400, 16), r"num_params: expected a number of at most 1e\+100"),
        (lambda: serving_bytes(1e308, 16), r"num_params: expected a number of at most 1e\+100, got 1e\+308"),
        (lambda: serving_bytes(1e9, 16, 1e300), "overhead"),
        (lambda: training_bytes(10**400), r"num_params: expected a number of at most 1e\+100"),
        (lambda: training_bytes(1e308), r"num_params: expected a number of at most 1e\+100, got 1e\+308"),
        (lambda: training_bytes(1, activations=10**400), "activations"),
        (lambda: kv_cache_bytes(SMALL, 10**400, 0.5), "num_tokens"),
        (lambda: gpus_needed(10**400, "a100-80gb"), "num_bytes"),
        (lambda: serving_bytes(1e9, 5), "bits"),
        (lambda: serving_bytes(1e9, 16, 0.5), "overhead"),
        (lambda: training_bytes(1e9, "fp32-adamw"), "fp32-adam"),
        (lambda: training_bytes(1e9, activations=-1), "activations"),
        (lambda: activation_bytes(SMALL, 0, 16), "batch"),
        (lambda: activation_bytes(SMALL, 1, -16), "sequence"),
        (lambda: activation_bytes(SMALL, 1, 16, recompute="some"), "recompute"),
        (lambda: activation_bytes(SMALL, 1, 16, tensor_parallel=4), "tensor_parallel"),
        (lambda: kv_cache_bytes(SMALL, -1), "num_tokens"),
        (lambda: kv_cache_bytes(SMALL, 1, 0), "bytes_per_element"),
        (lambda: gpus_needed(1, "a100"), "a100-80gb"),
        (lambda: gpus_needed(0, "a100-80gb"), "num_bytes"),
        (lambda: DeviceSpec("none", 0, 1e12, (), 0.0), "memory_bytes of 'none'"),
        (lambda: gpus_needed(1, "a100-80gb", 1.5), "usable_fraction"),
        (lambda: estimate(SMALL, ["float33"]), "float32"),
    ],
)
def test_wrong_values_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: serving_bytes("7B", 16), "num_params"),
        (lambda: serving_bytes(True, 16), "num_params"),
        (lambda: activation_bytes(SMALL, 1.5, 16), "batch"),
        (lambda: kv_cache_bytes(SMALL, "many"), "num_tokens"),
        (lambda: estimate("llama-7b"), "config_or_model"),
        (lambda: num_parameters("llama-7b"), "config: expected a ModelConfig, got str 'llama-7b'"),
        (lambda: kv_cache_bytes("llama-7b", 1), "config"),
        (lambda: activation_bytes("llama-7b", 1, 1), "config"),
        (lambda: activation_bytes(SMALL, 1, 1, flash="no"), "flash"),
    ],
)
def test_wrong_types_name_the_argument(call, named):
    with pytest.raises(TypeError, match=named):
        call()


@pytest.mark.parametrize("num_params", [10**100, 1e100])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_largest_number_does_not_overflow(num_params, recipe):
    assert serving_bytes(num_params, 32, 1e100) == pytest.approx(4e200)
    assert training_bytes(num_params, recipe, 10**100).total > num_params


def test_parameter_counts_add_up():
    counts = parameter_counts(SMALL)
    assert counts.total == sum(dataclasses.asdict(counts).values())


def _one_step(model, optimizer, batch, sequence):
    tokens = torch.randint(model.config.vocab_size, (batch, sequence), device=model.device)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()


def _benchmark(root):
    spec = importlib.util.spec_from_file_location("benchmark_memory", root / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "recipe", "batch", "sequence"),
    [
        ("smollm2-135m", "fp32-adam", 1, 128),
        ("smollm2-135m", "fp32-adam", 8, 1024),
        ("smollm2-135m", "bf16-adam", 8, 1024),
        ("llama-3.2-1b", "fp32-adam", 1, 128),
        ("llama-3.2-1b", "bf16-adam", 4, 1024),
    ],
)
def test_training_memory_on_a_gpu(root, name, recipe, batch, sequence):
    benchmark = _benchmark(root)
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    benchmark.warm_up("cuda")
    row = benchmark.training_step(name, recipe, batch, sequence, None, "cuda")
    assert row["states_ratio"] == pytest.approx(1, abs=0.005)
    assert row["peak_ratio"] == pytest.approx(1, abs=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b"])
def test_kv_cache_on_a_gpu(root, name):
    row = _benchmark(root).cache(name, 2, 512, "cuda")
    assert row["predicted"] == row["measured"]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "benchmarks" / "results" / "memory").glob("*.json"))
)
def test_published_measurements_hold_what_they_claim(file):
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["device"]
    assert result["commit"]
    for row in result["training_steps"]:
        if row["allocator"] != "expandable_segments:False":
            assert row["states_ratio"] == pytest.approx(1, abs=0.005), row["model"]
        assert row["peak_ratio"] == pytest.approx(1, abs=0.03), row["model"]
    assert all(row["predicted"] == row["measured"] for row in result["kv_caches"])


def test_the_readme_states_the_worst_cases(root):
    """The figures in README's table, from the H100's result file."""
    result = json.loads((root / "benchmarks" / "results" / "memory" / "NVIDIA-H100-80GB-HBM3.json").read_text("utf-8"))
    rows = result["training_steps"]
    fine = [r for r in rows if r["allocator"] == "expandable_segments:True"]
    default = [r for r in rows if r["allocator"] == "expandable_segments:False"]

    def percent(ratios, digits):
        return f"{100 * max(abs(ratio - 1) for ratio in ratios):.{digits}f} %"

    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"| {percent([r['states_ratio'] for r in fine], 2)} (" in readme
    assert f"rounds: {percent([1 / r['states_ratio'] for r in default], 1)} " in readme
    assert f"| {percent([r['peak_ratio'] for r in fine if r['flash']], 1)} (" in readme
    assert f"({percent([r['peak_ratio'] for r in fine if not r['flash']], 1)} without)" in readme
