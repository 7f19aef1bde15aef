"""What a model takes of a GPU's memory: weights, gradients, optimizer states, activations, KV cache.

Exact counts where the shape is known, with the rules of thumb beside them. Sizes are bytes. Pure Python: neither
torch nor numpy is imported, so the same functions run in a reader's browser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmlab.arguments import checked, instance_of, integer, number, one_of
from llmlab.config import DTYPE_BYTES, ModelConfig
from llmlab.hardware import DeviceSpec, find_device

BITS = (2, 3, 4, 8, 16, 32)


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters each part of a model holds; each field sums over all layers."""

    embedding: int
    attention: int
    mlp: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.mlp + self.norm + self.head


@checked(config=instance_of(ModelConfig))
def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of each part of a transformer from its shape.

    embedding  V·D, plus position and token-type rows of D
    attention  L·(D·H·d + 2·D·H_kv·d + H·d·D), plus biases
    mlp        L·n·D·F with n = 3 matrices where the MLP is gated, else 2, plus biases
    norm       D a norm (a scale), 2·D where it has a bias; d each for norms on queries and keys
    head       V·D, or 0 where it is the embedding (tied: stored once), plus its bias; a pooler's D·D + D

    Source: the checkpoints' own modules; agrees with transformers' classes to the last parameter.
    """
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    query = config.num_heads * config.head_size
    key_value = 2 * config.num_kv_heads * config.head_size

    embedding = (V + config.position_rows + config.token_types) * D

    attention = D * query + D * key_value + query * D
    if config.qkv_bias:
        attention += query + key_value
    if config.output_bias:
        attention += D

    mlp = (3 if config.gated_mlp else 2) * D * F
    if config.mlp_bias:
        mlp += F + D

    one_norm = 2 * D if config.norm == "layer" else D
    norm = (config.num_layers * config.norms_per_layer + config.final_norm + config.embedding_norm) * one_norm
    if config.qk_norm:
        norm += config.num_layers * 2 * config.head_size

    head = 0
    if config.lm_head:
        head = (0 if config.tied_embeddings else V * D) + (V if config.head_bias else 0)
    if config.pooler:
        head += D * D + D

    return ParameterCounts(embedding, config.num_layers * attention, config.num_layers * mlp, norm, head)


def num_parameters(config: ModelConfig) -> int:
    """P, the number of parameters of a model; weights that two modules share count once."""
    return parameter_counts(config).total


@checked(num_params=number(above=0), bits=one_of(BITS), overhead=number(at_least=1))
def serving_bytes(num_params: float, bits: int, overhead: float = 1.2) -> float:
    """The rule of thumb for serving: M = P · 4 B / (32 / Q) · overhead.

    num_params: P; bits: Q, the width of a weight; overhead: 1.2 leaves 20 % for activations and the rest. Bytes.

    The 20 % is a habit, not a law: a KV cache grows with the tokens in flight (``kv_cache_bytes``) and can pass it
    many times over. Raises ValueError for a width that is not stored anywhere (5 bits) or a size that is not positive.
    """
    return num_params * 4 / (32 / bits) * overhead


@dataclass(frozen=True)
class Recipe:
    """What a training recipe keeps for each parameter, by dtype.

    moments: how many running averages the optimizer holds; moment_block: elements that share one float32 scale
    where the moments are quantized (0: they are not).
    """

    weights: str
    gradients: str
    master: str | None
    moments: int
    moment_dtype: str = "float32"
    moment_block: int = 0


RECIPES: dict[str, Recipe] = {
    "fp32-adam": Recipe("float32", "float32", None, 2),
    "fp32-sgd": Recipe("float32", "float32", None, 0),
    "fp32-momentum": Recipe("float32", "float32", None, 1),
    "mixed-adam": Recipe("float16", "float16", "float32", 2),
    "bf16-adam": Recipe("bfloat16", "bfloat16", None, 2, "bfloat16"),
    "fp32-adam8bit": Recipe("float32", "float32", None, 2, "int8", 256),
    "bf16-adam8bit": Recipe("bfloat16", "bfloat16", None, 2, "int8", 256),
}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds, by owner."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@checked(num_params=number(above=0), recipe=one_of(RECIPES), activations=number(at_least=0))
def training_bytes(num_params: float, recipe: str = "fp32-adam", activations: int = 0) -> TrainingMemory:
    """Bytes that a training recipe holds for P parameters, and the activations it is told of.

    weights    P · w
    gradients  P · g
    optimizer  P · (master + moments · (s + 4 / block)): a full-precision copy of the weights in mixed precision, and
               the moments of s bytes, with one float32 scale a block where they are quantized

    The classic sums follow: fp32 Adam 4 + 4 + 8 = 16 B a parameter, mixed precision 2 + 2 + 12 = 16 B as well.
    Source: Rajbhandari et al. 2020 (ZeRO), section 3.1; Dettmers et al. 2022 for block-wise moments (blocks of
    256 as bitsandbytes has them; it keeps tensors under 4,096 elements in float32, which is left out here). Raises ValueError for an unknown recipe.
    """
    r = RECIPES[recipe]
    weights = num_params * DTYPE_BYTES[r.weights]
    gradients = num_params * DTYPE_BYTES[r.gradients]
    optimizer = num_params * r.moments * DTYPE_BYTES[r.moment_dtype]
    if r.moment_block:
        optimizer += r.moments * math.ceil(num_params / r.moment_block) * DTYPE_BYTES["float32"]
    if r.master:
        optimizer += num_params * DTYPE_BYTES[r.master]
    return TrainingMemory(int(weights), int(gradients), int(optimizer), activations)


@checked(
    config=instance_of(ModelConfig), batch=integer(at_least=1), sequence=integer(at_least=1), bytes_per_element=one_of((1, 2, 4, 8)),
    recompute=one_of((None, "selective", "full")), flash=instance_of(bool), tensor_parallel=integer(at_least=1), sequence_parallel=instance_of(bool),
)  # fmt: skip
def activation_bytes(
    config: ModelConfig,
    batch: int,
    sequence: int,
    bytes_per_element: int = 2,
    recompute: str | None = None,
    flash: bool = True,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
) -> int:
    """Bytes that the L layers keep for the backward pass, on one of t tensor-parallel ranks.

    One token in one layer keeps, with e bytes an element:

    norms      each: its input (e·D; eager RMSNorm keeps it in float32 beside the normalised value, (4 + e)·D)
               and its output, which the next product reads (e·D)
    attention  queries and what attention returns (2·e·H·d), keys and values (2·e·H_kv·d);
               flash: the log-sum-exp (4·H); else the S attention weights of each head (e·H·S, and (e + 1)·H·S
               more where they pass through dropout)
    MLP        gated: gate, its activation, up, their product (4·e·F); plain: before and after GELU (2·e·F; ReLU
               needs only its output, e·F)
    dropout    a mask of one byte for each of the residual additions (D each)

    For the decoder of Korthikanti et al. 2022 (LayerNorm, GELU, F = 4·D, dropout, e = 2, no flash) the sum is
    their S·B·D·(34 + 5·H·S/D) a layer. Tensor parallelism divides what lies inside attention and MLP by t
    (10 + 24/t + 5·H·S/(D·t)); sequence parallelism divides the rest as well. ``recompute``: "selective" recomputes
    the attention weights, "full" keeps only the layers' inputs (e·D). Embedding, head and loss are apart: see
    ``training_peak_bytes``. Raises ValueError where t does not divide H.
    """
    H, D, F, e, t = config.num_heads, config.hidden_size, config.intermediate_size, bytes_per_element, tensor_parallel
    if H % t:
        raise ValueError(f"tensor_parallel: expected a divisor of the {H} query heads of {config.name!r}, got {t}")
    tokens = batch * sequence
    rest_ranks = t if sequence_parallel else 1
    if recompute == "full":
        return tokens * config.num_layers * e * D // rest_ranks

    norm_input = (4 + e) * D if config.norm == "rms" else e * D
    rest = config.norms_per_layer * (norm_input + e * D)
    if config.dropout:
        rest += 2 * D

    kv_heads = max(1, math.ceil(config.num_kv_heads / t))
    inside = 2 * e * (H // t) * config.head_size + 2 * e * kv_heads * config.head_size
    if config.qk_norm:
        inside += (4 + e) * (H // t + kv_heads) * config.head_size
    if recompute is None:
        weights = e + (e + 1 if config.attention_dropout else 0)
        inside += 4 * (H // t) if flash else weights * (H // t) * sequence
    if config.gated_mlp:
        inside += 4 * e * F // t
    else:
        inside += (e if config.activation == "relu" else 2 * e) * F // t
    return tokens * config.num_layers * (rest // rest_ranks + inside)


@checked(batch=integer(at_least=1), sequence=integer(at_least=1), recipe=one_of(("fp32-adam", "bf16-adam", "fp32-sgd")))
def training_peak_bytes(
    config: ModelConfig,
    batch: int,
    sequence: int,
    recipe: str = "fp32-adam",
    recompute: str | None = None,
    flash: bool = True,
) -> int:
    """The most that one training step of a causal language model holds at once, on one device.

    peak = weights + optimizer states + max(activations + 12·V·T, gradients + tie)

    The step starts without gradients (they are freed between steps). Its high tide is either the start of the
    backward pass, when every activation is alive and the loss holds three float32 tensors of T = B·S rows by V
    logits (the log-probabilities and two gradients), or the end of the backward pass, when all gradients are there.
    Where head and embedding are tied, their two gradients and the sum are alive at once: tie = 2·e·V·D. Activations are those of the layers (``flash``: without the attention weights), and for each token the final norm and the head's input,
    and one layer's own under full recomputation. Assumes the states' dtype is the activations', and a fused
    optimizer without temporaries.
    """
    e = int(DTYPE_BYTES[RECIPES[recipe].weights])
    tokens = batch * sequence
    held = training_bytes(num_parameters(config), recipe)
    activations = activation_bytes(config, batch, sequence, e, recompute, flash)
    final_norm = ((4 + e) if config.norm == "rms" else e) * config.hidden_size + e * config.hidden_size
    loss = 12 * config.vocab_size
    at_backward = activations + tokens * (final_norm + loss)
    if recompute == "full":
        one_layer = activation_bytes(config, batch, sequence, e, None, flash) // config.num_layers
        at_backward = max(at_backward, activations + one_layer)
    tie = 2 * e * config.vocab_size * config.hidden_size if config.tied_embeddings else 0
    return held.weights + held.optimizer + max(at_backward, held.gradients + tie)


@checked(config=instance_of(ModelConfig), num_tokens=integer(at_least=0), bytes_per_element=number(above=0))
def kv_cache_bytes(config: ModelConfig, num_tokens: int, bytes_per_element: float = 2) -> int:
    """Bytes of the KV cache of ``num_tokens`` tokens: 2 · L · H_kv · d · bytes an element · tokens.

    A key and a value for each token, layer and key/value head; with grouped-query attention H_kv < H, and taking H
    instead overstates the cache H/H_kv times. Source: Kwon et al. 2023, section 3.
    """
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_size
    return int(num_tokens * per_token * bytes_per_element)


@checked(num_bytes=number(above=0), usable_fraction=number(above=0, at_most=1))
def gpus_needed(num_bytes: float, device: DeviceSpec | str, usable_fraction: float = 1.0) -> int:
    """How many devices hold ``num_bytes``: ⌈bytes / (memory of one · usable fraction)⌉.

    usable_fraction: what the driver, the framework and fragmentation leave; serving engines commonly take 0.9.
    A lower bound: it cuts the bytes anywhere, and a real split must also divide heads or layers.
    """
    memory = find_device(device).memory_bytes
    return math.ceil(num_bytes / (memory * usable_fraction))


@checked(num_devices=integer(at_least=1), weight_bits=one_of(BITS), usable_fraction=number(above=0, at_most=1))
def kv_tokens_that_fit(
    config: ModelConfig, device: DeviceSpec | str, num_devices: int = 1, weight_bits: int = 16,
    usable_fraction: float = 0.9, bytes_per_element: float = 2,
) -> int:  # fmt: skip
    """Tokens of KV cache that fit beside the exact weights: ⌊(n · memory · fraction - P · Q/8) / KV bytes of a token⌋.

    0 where the weights alone do not fit. What the devices need for activations must be in ``usable_fraction``.
    """
    room = num_devices * find_device(device).memory_bytes * usable_fraction - num_parameters(config) * weight_bits / 8
    return max(0, int(room // kv_cache_bytes(config, 1, bytes_per_element)))


@dataclass(frozen=True)
class MemoryEstimate:
    """One row of ``estimate``; bytes. training_bytes is None where the dtype cannot be trained in."""

    dtype: str
    largest_layer_bytes: float
    total_bytes: float
    training_bytes: float | None
    buffer_bytes: int


def estimate(
    config_or_model: Any, dtypes: Iterable[str] = ("float32", "float16", "int8", "int4")
) -> list[MemoryEstimate]:
    """What accelerate's estimator prints, by dtype, with tied weights counted once and buffers apart.

    config_or_model: a ModelConfig, or any torch module, on the meta device too (then nothing is allocated).
    largest layer: the largest block that must sit on one device; training with Adam is 4 times the float32 size in
    float32, and 2 times in 16 bits (accelerate's account: master weights, gradients, moments, whichever is largest).
    A module's buffers (rotary frequencies, masks) are reported in ``buffer_bytes``, not in the total.
    """
    dtypes = [dtypes] if isinstance(dtypes, str) else list(dtypes)
    for dtype in dtypes:
        one_of(DTYPE_BYTES)("dtypes", dtype)
    if isinstance(config_or_model, ModelConfig):
        largest, total, buffers = _sizes_of_config(config_or_model)
    elif hasattr(config_or_model, "named_parameters"):
        largest, total, buffers = _sizes_of_module(config_or_model)
    else:
        raise TypeError(
            f"config_or_model: expected a ModelConfig or a torch module, got {type(config_or_model).__name__}"
        )
    rows = []
    for dtype in dtypes:
        size = DTYPE_BYTES[dtype]
        training = {4.0: 4 * total * 4.0, 2.0: 2 * total * 4.0}.get(size)
        rows.append(MemoryEstimate(dtype, largest * size, total * size, training, buffers))
    return rows


def _sizes_of_config(config: ModelConfig) -> tuple[int, int, int]:
    counts = parameter_counts(config)
    outside = config.final_norm + config.embedding_norm
    one_norm = 2 * config.hidden_size if config.norm == "layer" else config.hidden_size
    layer = (counts.attention + counts.mlp + counts.norm - outside * one_norm) // config.num_layers
    embedding = counts.embedding + one_norm if config.embedding_norm else config.vocab_size * config.hidden_size
    head = config.vocab_size * (config.hidden_size + config.head_bias) if config.lm_head else 0
    return max(layer, embedding, head), counts.total, 0


def _sizes_of_module(module: Any) -> tuple[int, int, int]:
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    names = {name for name, _ in module.named_parameters()}
    shared = {name for name, source in dict(tied).items() if name in names and source in names and name != source}
    total = sum(p.numel() for name, p in module.named_parameters() if name not in shared)
    buffers = sum(b.numel() * b.element_size() for _, b in module.named_buffers())
    whole = set(getattr(module, "_no_split_modules", None) or [])

    def largest(part: Any) -> int:
        children = list(part.children())
        if not children or type(part).__name__ in whole:
            return sum(p.numel() for p in part.parameters())
        return max(largest(child) for child in children)

    return largest(module), total, buffers
