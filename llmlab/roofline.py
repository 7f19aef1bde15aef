"""How fast a step of generation can be at best: its bytes over the bandwidth, its operations over the rate.

A step runs T new tokens of some sequences through the model. It reads every weight once, whatever T is, and the keys and
values of each sequence; decoding has one new token a sequence, so little arithmetic for each byte. Pure Python.

Left out: activations and the T rows looked up in the embedding (D elements each, beside millions of weights), softmax,
norms, rotary positions, launches, and whatever keeps a real kernel from the data sheet's figures.

Sources: Williams et al. 2009, "Roofline: An Insightful Visual Performance Model for Multicore Architectures"; Pope et
al. 2022, "Efficiently Scaling Transformer Inference", arXiv:2211.05102, sections 2 and 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llmlab.arguments import checked, instance_of, integer, number, one_of
from llmlab.config import DTYPE_BYTES, ModelConfig
from llmlab.hardware import DeviceSpec, find_device
from llmlab.memory import kv_cache_bytes, parameter_counts


class Work(NamedTuple):
    """What one step computes, counted over its sequences.

    new_tokens: T, run through the model. kv_tokens: K, whose keys and values attention reads, the new ones included.
    attended_pairs: A, pairs of a new token and a key that it sees. logits: sequences of which a next token is wanted.
    """

    new_tokens: int
    kv_tokens: int
    attended_pairs: int
    logits: int


@checked(batch=integer(at_least=1), context=integer(at_least=1))
def decode_work(batch: int, context: int) -> Work:
    """One new token of each of B sequences that then hold n tokens: T = B, K = A = B·n, B logits.

    context: n, the new token included. Raises ValueError for a count below 1.
    """
    return Work(batch, batch * context, batch * context, batch)


@checked(batch=integer(at_least=1), prompt=integer(at_least=1), cached=integer())
def prefill_work(batch: int, prompt: int, cached: int = 0) -> Work:
    """n new tokens of each of B prompts after c cached ones: T = B·n, K = B·(c + n), A = B·(n·c + n·(n + 1)/2), B logits.

    prompt: n. cached: c, tokens whose keys and values are there already: a prefix that hit, or earlier chunks. The pairs
    grow with the square of the prompt. Raises ValueError for a negative count or no prompt.
    """
    pairs = prompt * cached + prompt * (prompt + 1) // 2
    return Work(batch * prompt, batch * (cached + prompt), batch * pairs, batch)


@checked(config=instance_of(ModelConfig))
def weights_read(config: ModelConfig) -> int:
    """Parameters that a step reads whole, each once: layers, norms and head.

    weights = P - embedding, and + V·D where the head is the embedding (tied): stored once, read as the head. The tables
    of an embedding apart, of positions and of token types are not read whole, but looked up.
    """
    counts = parameter_counts(config)
    tied_head = config.vocab_size * config.hidden_size if config.lm_head and config.tied_embeddings else 0
    return counts.total - counts.embedding + tied_head


@checked(work=instance_of(Work), bytes_per_weight=number(above=0), bytes_per_kv_element=number(above=0))
def step_bytes(config: ModelConfig, work: Work, bytes_per_weight: float = 2, bytes_per_kv_element: float = 2) -> float:
    """The least that a step moves between memory and chip: weights·w + 2·L·H_kv·d·e·(K + T), in bytes.

    w, e: bytes of a weight, and of an element of the KV cache. Every weight is read once, keys and values of K tokens
    are read once, and those of the T new ones written. Raises ValueError for a width that is not above 0.
    Source: Pope et al. 2022, section 2.
    """
    kept = work.kv_tokens + work.new_tokens
    return weights_read(config) * bytes_per_weight + kv_cache_bytes(config, kept, bytes_per_kv_element)


@checked(config=instance_of(ModelConfig), work=instance_of(Work))
def step_flops(config: ModelConfig, work: Work) -> int:
    """Operations of a step, two for a multiply-add: 2·M·T + 4·L·H·d·A + 2·V·D·logits.

    M: elements of the layers' matrices, L·(D·H·d + 2·D·H_kv·d + H·d·D + n·D·F), n = 3 where the MLP is gated, else 2.
    Each pair of a query and a key costs d multiply-adds for the score and d for the value, in each head. The head runs
    for those tokens only whose next one is wanted. Source: Pope et al. 2022, section 2; Kaplan et al. 2020, table 1.
    """
    matrices = 2 * _matrix_elements(config) * work.new_tokens
    attention = 4 * config.num_layers * config.num_heads * config.head_size * work.attended_pairs
    head = 2 * config.vocab_size * config.hidden_size * work.logits if config.lm_head else 0
    return matrices + attention + head


def _matrix_elements(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    mlp = (3 if config.gated_mlp else 2) * config.intermediate_size
    return config.num_layers * config.hidden_size * (heads * config.head_size + mlp)


def arithmetic_intensity(
    config: ModelConfig, work: Work, bytes_per_weight: float = 2, bytes_per_kv_element: float = 2
) -> float:
    """Operations for each byte moved: ``step_flops`` / ``step_bytes``.

    Below a device's rate / bandwidth (295 for an H100 in bfloat16, from its data sheet) a step waits for memory, above
    it for arithmetic. Raises as ``step_bytes``. Source: Williams et al. 2009.
    """
    return step_flops(config, work) / step_bytes(config, work, bytes_per_weight, bytes_per_kv_element)


@checked(kv_dtype=one_of((None, *DTYPE_BYTES)), overlap=instance_of(bool))
def step_seconds(
    config: ModelConfig, device: DeviceSpec | str, work: Work,
    dtype: str = "bfloat16", kv_dtype: str | None = None, overlap: bool = True,
) -> float:  # fmt: skip
    """The floor of a step's time: max(bytes / bandwidth, operations / rate), in seconds.

    dtype: of weights and arithmetic; kv_dtype: of the KV cache, dtype where it is None. overlap: whether all reading may
    hide behind all arithmetic, the lower bound; with False the matrices (weights; their and the head's operations) and
    attention (keys and values; its operations) run one after the other, and their two floors add up. Raises ValueError
    for an unknown device or a dtype that it does not compute in. Source: Williams et al. 2009; Pope et al. 2022.
    """
    spec = find_device(device)
    rate = spec.flops_of(dtype)
    width, kv_width = DTYPE_BYTES[dtype], DTYPE_BYTES[kv_dtype or dtype]
    attention_bytes = kv_cache_bytes(config, work.kv_tokens + work.new_tokens, kv_width)
    matrix_bytes = step_bytes(config, work, width, kv_width) - attention_bytes
    matrix_flops = step_flops(config, work._replace(attended_pairs=0))
    attention_flops = step_flops(config, work) - matrix_flops

    def floor(num_bytes: float, flops: float) -> float:
        return max(num_bytes / spec.memory_bandwidth, flops / rate)

    if overlap:
        return floor(matrix_bytes + attention_bytes, matrix_flops + attention_flops)
    return floor(matrix_bytes, matrix_flops) + floor(attention_bytes, attention_flops)


@checked(config=instance_of(ModelConfig), context=integer())
def crossover_batch(config: ModelConfig, device: DeviceSpec | str, dtype: str = "bfloat16", context: int = 0) -> float:
    """The batch from which a decoding step waits for arithmetic and no longer for memory; infinite where none does.

    W / bw + B·k / bw = B·f / rate, so B = (W / bw) / (f / rate - k / bw)

    W: bytes of the weights; f: operations of one sequence's token; k: bytes of its keys and values, with ``context``
    tokens each, the new one included; bw: memory bandwidth. context = 0 leaves the cache and attention out: then B is about
    rate / bw · w / 2, w bytes a weight, whatever the model. With a cache the batch is larger, and from some context on no
    batch is large enough: each sequence brings more bytes than arithmetic. Raises as ``step_seconds``.
    Source: Pope et al. 2022, section 2.
    """
    spec = find_device(device)
    rate, width = spec.flops_of(dtype), DTYPE_BYTES[dtype]
    weight_seconds = weights_read(config) * width / spec.memory_bandwidth
    one = decode_work(1, context) if context else Work(1, 0, 0, 1)
    kv_bytes = kv_cache_bytes(config, one.kv_tokens + one.new_tokens, width) if context else 0
    margin = step_flops(config, one) / rate - kv_bytes / spec.memory_bandwidth
    return weight_seconds / margin if margin > 0 else math.inf


@checked(config=instance_of(ModelConfig))
def crossover_length(config: ModelConfig) -> float:
    """The prompt length from which attention costs more operations than the layers' matrices: n = M / (L·H·d) - 1.

    4·L·H·d·n·(n + 1)/2 = 2·M·n: attention grows with n², the matrices with n. M as in ``step_flops``.
    Source: Pope et al. 2022, section 2; Kaplan et al. 2020, section 2.1, who neglect attention below it.
    """
    return _matrix_elements(config) / (config.num_layers * config.num_heads * config.head_size) - 1
