"""The kernels in plain torch: what each Triton kernel must compute, and what runs where there is no GPU.

Letters: T tokens of a step, H query heads, H_kv key/value heads, d head size, D hidden size, F feed-forward size, V
vocabulary. A cache is [num_blocks, H_kv, block_size, d] for keys and another for values, for each layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.kernels.reference_quantized import dequantize_int4 as dequantize_int4
from llmlab.kernels.reference_quantized import dequantize_nf4 as dequantize_nf4
from llmlab.kernels.reference_quantized import fp8_linear as fp8_linear
from llmlab.kernels.reference_quantized import int4_counters as int4_counters
from llmlab.kernels.reference_quantized import int4_linear as int4_linear
from llmlab.kernels.reference_quantized import int8_linear as int8_linear
from llmlab.kernels.reference_quantized import nf4_linear as nf4_linear
from llmlab.kernels.reference_quantized import quantize_rows as quantize_rows
from llmlab.kernels.reference_quantized import scaled_product as scaled_product


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside (Zhang and Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A projection of the normed x: [T, in] by a norm [in] and a matrix [out, in] to [T, out]."""
    return F.linear(rms_norm(x, norm, eps), weight, bias)


def add_linear(stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Add a projection of x [T, in] to the stream [T, out], in place."""
    stream += F.linear(x, weight, bias)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up of the normed x; weight [2 F, in] is the gate's matrix above the other's (Shazeer 2020)."""
    return silu_and_mul(norm_linear(x, norm, eps, weight, bias))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 F], gate and up side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate queries and keys by their positions, store keys and values in their slots; returns the queries [T, H, d].

    qkv: [T, (H + 2 H_kv) d], the three side by side. positions, slots: [T]; a slot is block * block_size + offset, and
    a token with slot -1 is stored nowhere. cos_sin: [positions, 2, d/2], of which the first half of the channels is
    turned against the second (Su et al. 2021, as Llama lays it out). q_norm, k_norm: weights [d] of an RMSNorm over
    each head before it turns (Qwen3).
    """
    _, kv_heads, block_size, head_size = k_cache.shape
    heads = qkv.shape[-1] // head_size - 2 * kv_heads
    q, k, v = qkv.view(len(qkv), -1, head_size).split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    cos, sin = cos_sin[positions].unsqueeze(2).unbind(1)  # [T, 1, d/2] each
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    kept = slots >= 0
    where = slots[kept]
    k_cache[where // block_size, :, where % block_size] = k[kept]
    v_cache[where // block_size, :, where % block_size] = v[kept]
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    splits: int = 1,
    scratch: tuple[Tensor, Tensor] | None = None,
    paged: bool = True,
    least: int = 64,
    beside: bool = False,
) -> None:
    """Attention of one query a sequence over the keys that its row of the block tables names, into out [N, H, d].

    softmax(scale q k^T) v, with H / H_kv query heads to a key/value head. rows, lengths: [N]; length 0 leaves its row
    of ``out`` as it is. splits: in how many parts a sequence's keys may be read at once, with ``decode_scratch`` for
    what they leave each other; the twin needs neither. paged: False promises that each sequence's blocks follow one
    another, so that only the first is looked up: what paging costs is measured against that. least: keys of a part, of
    which the last alone may have fewer. beside: another kernel runs at the same time.
    Source: Kwon et al. 2023 for the tables, Dao et al. 2023 (Flash-Decoding) for the parts.
    """
    longest = int(lengths.max())
    if longest == 0:
        return
    block_size = k_cache.shape[2]
    blocks = block_tables[rows, : -(-longest // block_size)].clamp(min=0)
    k, v = (c[blocks].transpose(1, 2).flatten(2, 3) for c in (k_cache, v_cache))  # [N, H_kv, keys, d]
    hidden = torch.arange(k.shape[2], device=q.device) >= lengths[:, None]  # [N, keys]
    v = v.masked_fill(hidden[:, None, :, None], 0.0)  # what a free slot holds may be NaN, and 0 * NaN is NaN
    k = k.masked_fill(hidden[:, None, :, None], 0.0)
    grouped = q.view(len(q), k.shape[1], -1, q.shape[2])  # [N, H_kv, H / H_kv, d]
    mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=~hidden[:, None, None], scale=scale)
    used = lengths > 0
    out[used] = mixed.reshape(q.shape)[used]


def decode_scratch(
    num_rows: int, num_kv_heads: int, group: int, head_size: int, splits: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Room for the parts of ``decode_attention``, and its counters, which begin and end at 0; the twin needs none."""
    return None


def queries_per_tile(group: int) -> int:
    """Tokens in a tile of ``chunk_attention``: its rows are tokens times the query heads of a key/value head."""
    return max(1, 64 // group)


def chunk_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    chunks: Tensor,
    tiles: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Causal attention of chunks of prompts over all that their sequences have in the cache, into out [T, H, d].

    chunks: [C, 4], each with its first token's place in q, its number of tokens, its row of the block tables and its
    first position; number 0 is padding. tiles: [n, 2], a chunk and a first token in it for each piece of work; the twin
    needs none.
    """
    block_size = k_cache.shape[2]
    for first, count, row, position in chunks.tolist():
        if count == 0:
            continue
        length = position + count
        blocks = block_tables[row, : -(-length // block_size)]
        k, v = (c[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for c in (k_cache, v_cache))  # [H_kv, keys, d]
        queries = q[first : first + count].transpose(0, 1)  # [H, count, d]
        visible = torch.ones(count, length, dtype=torch.bool, device=q.device).tril(position)
        mixed = F.scaled_dot_product_attention(
            queries[None], k[None], v[None], attn_mask=visible, scale=scale, enable_gqa=True
        )
        out[first : first + count] = mixed[0].transpose(0, 1)


def step_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    lengths: Tensor,
    chunks: Tensor | None,
    tiles: Tensor | None,
    scale: float,
    out: Tensor,
    splits: int = 1,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> None:
    """All attention of a step, into out [T, H, d]: decodes, which come first, and chunks, at the same time on a GPU.

    rows, lengths, splits, scratch: see ``decode_attention``. chunks, tiles: see ``chunk_attention``; None in a step
    without prompts. Source for the two at once: Kamath et al. 2025 (POD-Attention).
    """
    if n := len(rows):
        decode_attention(q[:n], k_cache, v_cache, block_tables, rows, lengths, scale, out[:n])
    if chunks is not None:
        chunk_attention(q, k_cache, v_cache, block_tables, chunks, tiles, scale, out)


def argmax(logits: Tensor) -> Tensor:
    """The largest logit's index in each row of [N, V], the first of equal ones; -1 where the row holds a NaN."""
    best, index = logits.max(dim=-1)
    return index.masked_fill(best.isnan(), -1)


def gumbel_argmax(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A draw from softmax(logits / temperature) in each row: the argmax of the logits with Gumbel noise added.

    temperature, seeds, positions: [N]. The noise depends on a row's seed and position alone, so that a request draws
    the same tokens in any batch; at temperature 0 there is none. -1 where a row holds a NaN.
    """
    noisy = logits.to(torch.float32, copy=True)
    for row in torch.nonzero(temperature > 0).flatten().tolist():
        generator = torch.Generator(logits.device).manual_seed(int(seeds[row]) * 1_000_003 + int(positions[row]))
        uniform = torch.rand(logits.shape[1], generator=generator, device=logits.device).clamp(min=1e-20)
        noisy[row] = noisy[row] / temperature[row] - torch.log(-torch.log(uniform))
    return argmax(noisy)


def gather_inputs(
    token_ids: Tensor,
    rows: Tensor,
    positions: Tensor,
    new_blocks: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """What a step computes: token ids and cache slots [T], from the host's words and what the GPU knows by itself.

    A token id of -1 stands for the row's last sampled token, which the host may not know yet; one that could not be
    sampled is computed as 0, and thrown away. A row of -1 is padding. new_blocks [N]: the blocks that the first N tokens
    begin, which are written into the tables; -1 for none.
    """
    begun = torch.nonzero(new_blocks >= 0).flatten()
    block_tables[rows[begun], positions[begun] // block_size] = new_blocks[begun]
    kept = rows >= 0
    held = rows.clamp(min=0)
    tokens = torch.where(token_ids >= 0, token_ids, last_tokens[held])
    slots = block_tables[held, positions // block_size] * block_size + positions % block_size
    return torch.where(kept, tokens.clamp(min=0), 0), torch.where(kept, slots, -1)


def take_words(ring: Tensor, words: Tensor, turn: Tensor) -> None:
    """The next turn of a ring of the host's buffers [turns, width]: its first words, and its number [1]."""
    turn.copy_((turn + 1) % len(ring))
    words.copy_(ring[int(turn), : len(words)])


def give_tokens(tokens: Tensor, rows: Tensor, last_tokens: Tensor, ring: Tensor, turn: Tensor) -> None:
    """Keep tokens [N] for the next step, each in its row, and give them to the host, in this turn of a ring [turns, width]."""
    last_tokens[rows.long()] = tokens.to(last_tokens.dtype)
    ring[int(turn), : len(tokens)] = tokens


def round_columns(
    block: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    """Round a block's columns one after another, each error made up for by the columns behind it: GPTQ's inner sweep.

    q_j = clip(round(w_j / s_j) + z_j), e_j = (w_j - s_j (q_j - z_j)) / U_jj, w_later -= e_j U_j,later. block: [rows, b];
    factor: U [b, b], upper triangular; scale, zero: [rows, b], whole numbers; None for no zero points. Returns the values
    s (q - z) and the errors e, [rows, b] each. A scale of 0 gives the value 0. Source: Frantar et al. 2022, algorithm 1.
    """
    free = block.T.contiguous().clone()  # columns as rows: each is read and written whole
    errors, scales = torch.empty_like(free), scale.T.contiguous().to(free.dtype)
    zeros = torch.zeros_like(scales) if zero is None else zero.T.contiguous().to(free.dtype)
    steps = torch.where(scales == 0, torch.ones_like(scales), scales)
    for j in range(len(free)):
        value = (free[j] / steps[j]).round_().add_(zeros[j]).clamp_(lowest, highest).sub_(zeros[j]).mul_(scales[j])
        torch.div(free[j] - value, factor[j, j], out=errors[j])
        free[j] = value
        free[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return free.T, errors.T
