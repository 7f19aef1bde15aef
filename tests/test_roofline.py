"""The roofline's formulas by hand for Llama-3.2-1B, and against operations that torch counts."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmlab.checkpoint import new_model
from llmlab.config import MODEL_CONFIGS, ModelConfig
from llmlab.hardware import DEVICES, DeviceSpec
from llmlab.memory import num_parameters
from llmlab.roofline import (
    Work,
    arithmetic_intensity,
    crossover_batch,
    crossover_length,
    decode_work,
    prefill_work,
    step_bytes,
    step_flops,
    step_seconds,
    weights_read,
)

LLAMA = MODEL_CONFIGS["llama-3.2-1b"]  # L 16, D 2048, F 8192, H 32, H_kv 8, d 64, V 128256, tied
PARAMETERS = 1_235_814_400
MATRICES = 16 * (2048 * 2048 + 2 * 2048 * 512 + 2048 * 2048 + 3 * 2048 * 8192)
HEAD = 128_256 * 2048
KV_BYTES = 2 * 16 * 8 * 64 * 2  # of one token, in bfloat16: 32,768
H100 = DEVICES["h100-80gb"]  # 3.35 TB/s, 989 TFLOP/s
# A device whose figures make the arithmetic plain: 1 B/s and 10 operations a second.
PLAIN = DeviceSpec("plain", 1, 1.0, (("bfloat16", 10.0), ("float16", 10.0), ("int8", 20.0)), 1.0)
SMALL = ModelConfig(
    "small", "llama", vocab_size=320, hidden_size=96, intermediate_size=256, num_layers=3, num_heads=6,
    num_kv_heads=2, head_size=32, max_positions=512, tied_embeddings=True, rotary_size=32,
)  # fmt: skip


def test_importing_the_formulas_brings_neither_torch_nor_numpy():
    code = "import sys, llmlab.roofline; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_decoding_step_of_llama_reads_every_parameter_once():
    """The tied table is stored once and read once, as the head; then 1,000 tokens' keys and values, and one's is written."""
    assert num_parameters(LLAMA) == weights_read(LLAMA) == PARAMETERS == MATRICES + HEAD + 33 * 2048
    assert step_bytes(LLAMA, decode_work(1, 1000)) == 2 * PARAMETERS + 32_768 * 1001
    assert step_bytes(LLAMA, decode_work(64, 1000)) == 2 * PARAMETERS + 64 * 32_768 * 1001
    assert step_bytes(LLAMA, decode_work(1, 1000), bytes_per_weight=0.5, bytes_per_kv_element=1) == (
        PARAMETERS / 2 + 16_384 * 1001
    )


def test_a_table_that_is_looked_up_is_not_read_whole():
    """GPT-J's embedding is apart from its head, OPT's table of positions from both, and BERT has no head at all."""
    gptj, opt, bert = (MODEL_CONFIGS[name] for name in ("gpt-j-6b", "opt-13b", "bert-base-cased"))
    assert weights_read(gptj) == 6_050_882_784 - 50_400 * 4096
    assert weights_read(opt) == num_parameters(opt) - (2048 + 2) * 5120
    assert weights_read(bert) == num_parameters(bert) - (28_996 + 512 + 2) * 768


def test_operations_of_llama_by_hand():
    """Decoding at 1,000 tokens: 2 for each matrix element and 4·L·H·d for each of the 1,000 pairs."""
    decode = 2 * MATRICES + 2 * HEAD + 4 * 16 * 32 * 64 * 1000
    assert step_flops(LLAMA, decode_work(1, 1000)) == decode == 2 * (PARAMETERS - 33 * 2048) + 131_072_000
    assert step_flops(LLAMA, decode_work(8, 1000)) == 8 * decode
    prefill = 1000 * 2 * MATRICES + 2 * HEAD + 4 * 16 * 32 * 64 * 1000 * 1001 // 2
    assert step_flops(LLAMA, prefill_work(1, 1000)) == prefill
    assert step_flops(LLAMA, prefill_work(1, 1000)._replace(logits=0)) == prefill - 2 * HEAD


def test_work_is_counted_pair_by_pair():
    """Of 3 tokens after 2, the first sees 3 keys, the second 4, the third 5."""
    assert decode_work(4, 10) == Work(4, 40, 40, 4)
    assert prefill_work(1, 3, cached=2) == Work(3, 5, 3 + 4 + 5, 1)
    assert prefill_work(5, 3) == Work(15, 15, 5 * (1 + 2 + 3), 5)
    assert prefill_work(2, 1, cached=9) == decode_work(2, 10)


@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 4))
def test_chunks_compute_what_the_whole_prompt_does_and_read_more(prompt, cached, batch):
    """Splitting a prompt changes no pair and no matrix, only the head of the first part and the keys read again."""
    whole = prefill_work(batch, cached + prompt)
    parts = [prefill_work(batch, prompt, cached), *([prefill_work(batch, cached)] if cached else [])]
    flops = sum(step_flops(LLAMA, part._replace(logits=0)) for part in parts)
    assert flops == step_flops(LLAMA, whole._replace(logits=0))
    assert sum(part.kv_tokens for part in parts) == whole.kv_tokens + batch * cached
    pairs = [(query, key) for query in range(cached, cached + prompt) for key in range(query + 1)]
    assert parts[0].attended_pairs == batch * len(pairs)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, name="untied", tied_embeddings=False),
        dataclasses.replace(SMALL, name="qwen3", architecture="qwen3", qk_norm=True),
        MODEL_CONFIGS["opt-13b"],
    ],
    ids=lambda config: config.name,
)
def test_operations_are_those_that_torch_counts(config):
    """torch's counter on transformers' own module, which computes all S² pairs and all S logits; OPT on the meta device."""
    sequence = 24
    device = "meta" if config.name == "opt-13b" else "cpu"
    model = new_model(config, device=device, dtype="bfloat16").eval()
    model.set_attn_implementation("eager")
    tokens = torch.zeros(1, sequence, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    work = Work(sequence, sequence, sequence**2, sequence)
    assert step_flops(config, work) == sum(counts.values())


def test_a_step_takes_the_longer_of_reading_and_computing():
    """An H100 decodes Llama-3.2-1B at batch 1 in no less than 0.75 ms, all of it reading; a prompt of 4,000 computes."""
    decode, prefill = decode_work(1, 1000), prefill_work(1, 4000)
    assert step_seconds(LLAMA, H100, decode) == pytest.approx((2 * PARAMETERS + 32_768 * 1001) / 3.35e12)
    assert step_seconds(LLAMA, "h100-80gb", decode) == pytest.approx(0.7476e-3, rel=1e-3)
    assert step_seconds(LLAMA, H100, prefill) == pytest.approx(step_flops(LLAMA, prefill) / 989e12)
    assert step_seconds(LLAMA, H100, decode, "float8") == pytest.approx((PARAMETERS + 16_384 * 1001) / 3.35e12)
    half = step_seconds(LLAMA, H100, decode, kv_dtype="float8")
    assert half == pytest.approx((2 * PARAMETERS + 16_384 * 1001) / 3.35e12)


def test_without_overlap_the_phases_add_up():
    """In a large decoding batch the matrices compute while attention reads: together they take less than in turn."""
    work = decode_work(512, 2000)
    matrices = (2 * (MATRICES + HEAD) * 512) / 989e12
    attention = 512 * 2001 * KV_BYTES / 3.35e12
    assert matrices > 2 * PARAMETERS / 3.35e12
    assert step_seconds(LLAMA, H100, work, overlap=False) == pytest.approx(matrices + attention)
    assert step_seconds(LLAMA, H100, work) == pytest.approx((2 * PARAMETERS + 512 * 2001 * KV_BYTES) / 3.35e12)


@given(st.integers(1, 600), st.integers(1, 5000), st.sampled_from(sorted(MODEL_CONFIGS)))
def test_the_sum_of_phases_lies_between_the_floor_and_twice_the_floor(batch, context, name):
    config, work = MODEL_CONFIGS[name], decode_work(batch, context)
    floor = step_seconds(config, H100, work)
    assert floor <= step_seconds(config, H100, work, overlap=False) * (1 + 1e-12) <= 2 * floor * (1 + 1e-9)


def test_intensity_is_operations_over_bytes():
    """Decoding does about one operation for each byte it reads; a prompt of 1,000 tokens, hundreds."""
    decode, prefill = decode_work(1, 1), prefill_work(1, 1000)
    assert arithmetic_intensity(LLAMA, decode) == step_flops(LLAMA, decode) / step_bytes(LLAMA, decode)
    assert arithmetic_intensity(LLAMA, decode) == pytest.approx(1, rel=1e-3)
    assert arithmetic_intensity(LLAMA, decode, bytes_per_weight=0.5) == pytest.approx(4, rel=1e-3)
    assert 700 < arithmetic_intensity(LLAMA, prefill) < 1000
    long = [arithmetic_intensity(LLAMA, decode_work(batch, 10_000)) for batch in (1, 16, 256, 4096)]
    # With long contexts batching hardly helps: keys and values are nobody else's. 4·H·d / (2·H_kv·d·2 B) = 4 of attention,
    # and the matrices' 2·(M + V·D) operations beside each sequence's 10,000 · 32,768 B.
    limit = (4 * 16 * 32 * 64 * 10_000 + 2 * (MATRICES + HEAD)) / (10_001 * KV_BYTES)
    assert long == sorted(long)
    assert long[-1] == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize(("device", "batch"), [("h100-80gb", 295.2), ("h200-141gb", 206.0), ("a100-80gb", 153.0)])
def test_without_a_cache_the_crossover_is_the_devices_ratio(device, batch):
    """2 B a weight and 2 operations: the batch is operations a second over bytes a second, nearly the model's own matter."""
    assert crossover_batch(LLAMA, device) == pytest.approx(batch, rel=1e-3)
    assert crossover_batch(MODEL_CONFIGS["llama-2-70b"], device) == pytest.approx(batch, rel=1e-3)


def test_fewer_bytes_a_weight_bring_the_crossover_nearer():
    assert crossover_batch(LLAMA, PLAIN, "bfloat16") == pytest.approx(10, rel=1e-3)
    assert crossover_batch(LLAMA, PLAIN, "int8") == pytest.approx(10, rel=1e-3)
    assert crossover_batch(LLAMA, "h100-80gb", "float8") == pytest.approx(1979 / 3.35 / 2, rel=1e-3)


@given(
    st.sampled_from(sorted(DEVICES)), st.sampled_from(["llama-3.2-1b", "llama-2-70b", "gpt-j-6b"]), st.integers(0, 3000)
)
def test_at_the_crossover_reading_takes_as_long_as_computing(device, name, context):
    """Put back into bytes and operations, batch by batch; infinite where a sequence brings more bytes than work."""
    spec, config = DEVICES[device], MODEL_CONFIGS[name]
    batch = crossover_batch(config, spec, "float16", context)
    one = decode_work(1, context) if context else Work(1, 0, 0, 1)
    kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_size * (context + 1 if context else 0)
    compute, read = step_flops(config, one) / spec.flops_of("float16"), kv_bytes / spec.memory_bandwidth
    if math.isinf(batch):
        assert compute <= read
    else:
        assert batch * compute == pytest.approx(2 * weights_read(config) / spec.memory_bandwidth + batch * read)
        assert batch >= crossover_batch(config, spec, "float16") * 0.99


def test_long_contexts_have_no_crossover():
    """Llama-3.2-1B on an H100: at 200 tokens each, more sequences than without a cache; at 300, never."""
    assert 295.2 < crossover_batch(LLAMA, H100, context=200) < math.inf
    assert crossover_batch(LLAMA, H100, context=300) == math.inf


def test_attention_overtakes_the_matrices_at_30_thousand_tokens():
    """M / (L·H·d) = 973,078,528 / 32,768 = 29,696: one token fewer, and both cost the same."""
    length = crossover_length(LLAMA)
    assert length == 29_696 - 1
    attention = 4 * 16 * 32 * 64 * prefill_work(1, 29_695).attended_pairs
    assert attention == 2 * MATRICES * 29_695


def test_attention_is_quadratic_in_the_prompt():
    """Twice the prompt, twice the matrices, four times the pairs."""

    def attention(prompt):
        work = prefill_work(1, prompt)
        return step_flops(LLAMA, work) - step_flops(LLAMA, work._replace(attended_pairs=0))

    assert attention(20_000) / attention(10_000) == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: decode_work(0, 5), ValueError, "batch"),
        (lambda: decode_work(1, 0), ValueError, "context"),
        (lambda: prefill_work(1, 0), ValueError, "prompt"),
        (lambda: prefill_work(1, 1, -1), ValueError, "cached"),
        (lambda: prefill_work(1, 1.5), TypeError, "prompt"),
        (lambda: weights_read("llama-3.2-1b"), TypeError, "config: expected a ModelConfig"),
        (lambda: step_flops("llama-3.2-1b", decode_work(1, 1)), TypeError, "config"),
        (lambda: step_bytes(LLAMA, decode_work(1, 1), bytes_per_weight=0), ValueError, "bytes_per_weight"),
        (lambda: step_bytes(LLAMA, decode_work(1, 1), 2, -1), ValueError, "bytes_per_kv_element"),
        (lambda: step_bytes(LLAMA, 5), TypeError, "work: expected a Work"),
        (lambda: step_flops(LLAMA, (1, 1, 1, 1)), TypeError, "work: expected a Work"),
        (lambda: step_seconds(LLAMA, "h100", decode_work(1, 1)), ValueError, "device"),
        (lambda: step_seconds(LLAMA, "v100-16gb", decode_work(1, 1)), ValueError, "dtype"),
        (lambda: step_seconds(LLAMA, H100, decode_work(1, 1), kv_dtype="fp8"), ValueError, "kv_dtype"),
        (lambda: step_seconds(LLAMA, H100, decode_work(1, 1), overlap=None), TypeError, "overlap"),
        (lambda: crossover_batch(LLAMA, H100, context=-1), ValueError, "context"),
        (lambda: crossover_batch(LLAMA, H100, "int3"), ValueError, "dtype"),
        (lambda: crossover_length(None), TypeError, "config"),
    ],
)
def test_wrong_arguments_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
