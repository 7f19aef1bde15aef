"""Each Triton kernel gives what its twin in torch gives; each twin what a plain formula gives."""

import inspect
import math

import pytest
import torch

from llmlab.kernels import kernels_for, reference
from llmlab.kernels import reference as twin

GPU = pytest.mark.gpu
SHAPES = [(9, 3, 64, 16), (4, 2, 32, 8), (32, 8, 64, 16), (16, 8, 128, 16), (8, 1, 128, 32)]  # H, H_kv, d, block size


def filled_cache(lengths, kv_heads, head_size, block_size, device="cpu", dtype=torch.float32, poison=float("nan")):
    """Caches with random keys and values for sequences of these lengths, NaN everywhere else; block tables; the contents."""
    blocks = max(1, -(-max(lengths) // block_size))
    tables = torch.randperm(len(lengths) * blocks + 5)[: len(lengths) * blocks].view(len(lengths), blocks)
    pools = [
        torch.full((len(lengths) * blocks + 5, kv_heads, block_size, head_size), poison, dtype=dtype) for _ in range(2)
    ]
    contents = []
    for row, length in enumerate(lengths):
        at = torch.arange(length)
        contents.append([torch.randn(length, kv_heads, head_size).to(dtype) for _ in pools])
        for pool, content in zip(pools, contents[-1], strict=True):
            pool[tables[row][at // block_size], :, at % block_size] = content
    return [p.to(device) for p in pools], tables.to(device, torch.int32), contents


def plain_attention(query, keys, values, visible, scale):
    """softmax(scale q k) v in double, head by head: query [H, d], keys and values [n, H_kv, d], the first ``visible``."""
    H, group = len(query), len(query) // keys.shape[1]
    out = []
    for head in range(H):
        k, v = keys[:visible, head // group].double(), values[:visible, head // group].double()
        out.append((scale * k @ query[head].double()).softmax(0) @ v)
    return torch.stack(out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_decode_twin_is_plain_attention(shape):
    H, kv_heads, d, block_size = shape
    lengths = [1, block_size, 3 * block_size + 5, 0]
    (k, v), tables, contents = filled_cache(lengths, kv_heads, d, block_size)
    q, out = torch.randn(4, H, d), torch.full((4, H, d), 7.0)
    twin.decode_attention(q, k, v, tables, torch.arange(4), torch.tensor(lengths), 0.3, out)
    for row in range(3):
        assert torch.allclose(out[row].double(), plain_attention(q[row], *contents[row], lengths[row], 0.3), atol=1e-5)
    assert (out[3] == 7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_chunk_twin_is_plain_causal_attention(shape):
    H, kv_heads, d, block_size = shape
    lengths = [block_size + 3, 2 * block_size]
    (k, v), tables, contents = filled_cache(lengths, kv_heads, d, block_size)
    chunks = torch.tensor([[2, 5, 1, block_size], [7, block_size + 3, 0, 0], [0, 0, 0, 0]])
    q, out = torch.randn(7 + block_size + 3, H, d), torch.full((7 + block_size + 3, H, d), 7.0)
    twin.chunk_attention(q, k, v, tables, chunks, torch.zeros(0, 2), 0.3, out)
    assert (out[:2] == 7).all()
    for first, count, row, position in chunks.tolist():
        for n in range(count):
            expected = plain_attention(q[first + n], *contents[row], position + n + 1, 0.3)
            assert torch.allclose(out[first + n].double(), expected, atol=1e-5)


def test_rotation_turns_pairs_by_the_positions_angle_and_stores_where_the_slot_says():
    kv_heads, d, block_size = 1, 4, 8
    angles = torch.arange(20)[:, None] * torch.tensor([1.0, 0.1])
    cos_sin = torch.stack((angles.cos(), angles.sin()), 1)
    qkv, positions, slots = torch.randn(3, 4 * d), torch.tensor([0, 3, 17]), torch.tensor([9, -1, 4])
    k, v = torch.zeros(2, kv_heads, block_size, d), torch.zeros(2, kv_heads, block_size, d)
    q = twin.rotate_and_store(qkv, positions, cos_sin, slots, k, v)
    for token in range(3):
        for head, turned in ((0, q[token, 0]), (1, q[token, 1])):
            x = qkv[token, head * d : (head + 1) * d]
            for pair in range(2):
                z = torch.complex(x[pair], x[pair + 2]) * torch.polar(torch.tensor(1.0), angles[positions[token], pair])
                assert torch.allclose(torch.complex(turned[pair], turned[pair + 2]), z, atol=1e-6)
    assert torch.equal(v[1, 0, 1], qkv[0, 3 * d :])
    assert torch.equal(v[0, 0, 4], qkv[2, 3 * d :])
    assert torch.equal(k[1, 0, 1], qkv[0, 2 * d : 3 * d])  # position 0 turns nothing
    assert int((v != 0).any(-1).sum()) == int((k != 0).any(-1).sum()) == 2


def test_argmax_takes_the_first_of_equals_and_marks_a_nan():
    logits = torch.tensor([[1.0, 3.0, 3.0], [float("nan"), 5.0, 1.0], [-1.0, -2.0, -3.0], [0.0, float("inf"), 2.0]])
    assert twin.argmax(logits).tolist() == [1, -1, 0, 1]


def draws(ops, device, n=20_000):
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = (2.0 * probabilities.log()).to(device).expand(n, 4).contiguous()  # at temperature 2 these probabilities
    heat = torch.full((n,), 2.0, device=device)
    seeds = torch.arange(n, device=device) % 97
    found = ops.gumbel_argmax(logits, heat, seeds, torch.arange(n, device=device))
    again = ops.gumbel_argmax(logits, heat, seeds, torch.arange(n, device=device))
    assert torch.equal(found, again)
    return torch.bincount(found.cpu(), minlength=4) / n, probabilities


def test_gumbel_noise_draws_from_the_softmax():
    shares, probabilities = draws(twin, "cpu", 4000)
    assert ((shares - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / 4000).sqrt()).all()


def test_inputs_come_from_the_host_or_from_the_last_step_and_new_blocks_are_written():
    tables = torch.arange(12).view(3, 4)
    tokens, slots = twin.gather_inputs(
        torch.tensor([-1, -1, 9, 5]), torch.tensor([1, 2, 0, -1]), torch.tensor([8, 20, 17, 3]), torch.tensor([40, -1]),
        torch.tensor([0, 70, -1]), tables, 8,
    )  # fmt: skip
    assert tokens.tolist() == [70, 0, 9, 0]  # the last could not be sampled
    assert slots.tolist() == [40 * 8, 10 * 8 + 4, 2 * 8 + 1, -1]
    assert tables[1].tolist() == [4, 40, 6, 7]


def turns(ops, device, most=5, used=3):
    """What a device has taken from a ring of three buffers and given to another, turn by turn."""
    pinned = device == "cuda"
    words = torch.arange(3 * most, dtype=torch.int32).view(3, most)
    told = words.pin_memory() if pinned else words
    given = torch.full((3, 4), -2).pin_memory() if pinned else torch.full((3, 4), -2)
    taken, turn = (
        torch.full((most,), 99, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    kept, found = torch.full((6,), 50, dtype=torch.int32, device=device), []
    for step in range(4):
        ops.take_words(told, taken[:used], turn)
        tokens = torch.tensor([7 + step, -1], device=device)
        ops.give_tokens(tokens, torch.tensor([step, 5], dtype=torch.int32, device=device), kept, given, turn)
        if pinned:
            torch.cuda.synchronize()
        found.append((taken.tolist(), int(turn), given.tolist()))
        told[0] += 100  # the host writes while the device has the others
    return found, kept.tolist()


def test_the_hosts_buffers_are_read_and_written_in_turn():
    found, kept = turns(twin, "cpu")
    assert [taken for taken, _, _ in found] == [
        [5, 6, 7, 99, 99],
        [10, 11, 12, 99, 99],
        [200, 201, 202, 99, 99],
        [5, 6, 7, 99, 99],
    ]
    assert [turn for _, turn, _ in found] == [1, 2, 0, 1]
    assert found[2][2] == [[9, -1, -2, -2], [7, -1, -2, -2], [8, -1, -2, -2]]
    assert kept == [7, 8, 9, 10, 50, -1]


def relative(got, expected):
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@GPU
def test_every_kernel_has_a_twin_of_the_same_signature():
    fused = kernels_for("cuda")
    for name in fused.__all__:
        ours, theirs = getattr(fused, name), getattr(reference, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_decode_attention_on_a_gpu(shape, dtype, splits):
    H, kv_heads, d, block_size = shape
    fused, bound = kernels_for("cuda"), 1e-3 if dtype == torch.float32 else 1e-2
    lengths = [1, block_size, 12 * block_size, 0, 300, 77]
    (k, v), tables, _ = filled_cache(lengths, kv_heads, d, block_size, "cuda", dtype)
    rows, keys = (
        torch.arange(6, device="cuda", dtype=torch.int32),
        torch.tensor(lengths, device="cuda", dtype=torch.int32),
    )
    q = torch.randn(6, H, d, device="cuda", dtype=dtype)
    got, expected = torch.full_like(q, float("nan")), torch.full_like(q, float("nan"))
    scratch = fused.decode_scratch(6, kv_heads, H // kv_heads, d, splits, q.device)
    for _ in range(2):  # the counters end as they began
        fused.decode_attention(q, k, v, tables, rows, keys, d**-0.5, got, splits, scratch)
    twin.decode_attention(q, k, v, tables, rows, keys, d**-0.5, expected)
    used = [0, 1, 2, 4, 5]
    assert relative(got[used], expected[used]) < bound
    assert got[3].isnan().all()
    assert int(scratch[1].abs().sum()) == 0


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunk_attention_on_a_gpu(shape, dtype):
    H, kv_heads, d, block_size = shape
    fused, bound = kernels_for("cuda"), 1e-3 if dtype == torch.float32 else 1e-2
    (k, v), tables, _ = filled_cache([500, 40, 130], kv_heads, d, block_size, "cuda", dtype)
    chunks = [(3, 200, 0, 300), (203, 40, 1, 0), (243, 1, 2, 129), (0, 0, 0, 0)]
    step = fused.queries_per_tile(H // kv_heads)
    tiles = [(n, begin) for n, c in enumerate(chunks) for begin in range(0, c[1], step)] + [(3, 0)]
    told = [torch.tensor(x, device="cuda", dtype=torch.int32) for x in (chunks, tiles)]
    q = torch.randn(244, H, d, device="cuda", dtype=dtype)
    got, expected = torch.full_like(q, 7.0), torch.full_like(q, 7.0)
    fused.chunk_attention(q, k, v, tables, *told, d**-0.5, got)
    twin.chunk_attention(q, k, v, tables, *told, d**-0.5, expected)
    assert relative(got, expected) < bound
    assert not got.isnan().any()
    assert (got[:3] == 7).all()


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("captured", [True, False])
def test_decodes_and_chunks_at_once_on_a_gpu(shape, dtype, captured):
    """Two long sequences are read in parts, one is short, one padding; chunks follow them, and a graph holds both."""
    H, kv_heads, d, block_size = shape
    fused, bound = kernels_for("cuda"), 1e-3 if dtype == torch.float32 else 1e-2
    lengths = [5000, 2049, 12, 0]
    (k, v), tables, _ = filled_cache([*lengths[:3], 1, 500, 40], kv_heads, d, block_size, "cuda", dtype)
    rows, keys = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([0, 1, 2, 0], lengths))
    chunks = [(3, 200, 4, 300), (203, 40, 5, 0)]  # the place of padding is a chunk's token
    step = fused.queries_per_tile(H // kv_heads)
    tiles = [(n, begin) for n, c in enumerate(chunks) for begin in range(0, c[1], step)]
    told = [torch.tensor(x, device="cuda", dtype=torch.int32) for x in (chunks, tiles)]
    q = torch.randn(244, H, d, device="cuda", dtype=dtype)
    got, expected = torch.full_like(q, 7.0), torch.full_like(q, 7.0)
    scratch = fused.decode_scratch(4, kv_heads, H // kv_heads, d, 4, q.device)

    def attend():
        fused.step_attention(q, k, v, tables, rows, keys, *told, d**-0.5, got, 4, scratch)

    attend()
    if captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend()
        got.fill_(7.0)
        graph.replay()
    twin.step_attention(q, k, v, tables, rows, keys, *told, d**-0.5, expected)
    assert relative(got, expected) < bound
    assert not got.isnan().any()
    assert (got[243] == 7).all()


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_and_store_on_a_gpu(shape, dtype, normed):
    H, kv_heads, d, block_size = shape
    fused, bound = kernels_for("cuda"), 1e-3 if dtype == torch.float32 else 1e-2
    qkv = torch.randn(7, (H + 2 * kv_heads) * d, device="cuda", dtype=dtype)
    positions = torch.randint(0, 50, (7,), device="cuda", dtype=torch.int32)
    slots = torch.randperm(6 * block_size, device="cuda")[:7].to(torch.int32)
    slots[3] = -1
    cos_sin = torch.randn(64, 2, d // 2, device="cuda")
    norms = [torch.randn(d, device="cuda", dtype=dtype) for _ in range(2)] if normed else [None, None]
    pools = [
        [torch.full((6, kv_heads, block_size, d), 9.0, device="cuda", dtype=dtype) for _ in range(2)] for _ in range(2)
    ]
    got = fused.rotate_and_store(qkv, positions, cos_sin, slots, *pools[0], *norms, 1e-6)
    expected = twin.rotate_and_store(qkv, positions, cos_sin, slots, *pools[1], *norms, 1e-6)
    assert relative(got, expected) < bound
    for ours, theirs in zip(*pools, strict=True):
        assert relative(ours, theirs) < bound
        assert torch.equal(ours == 9, theirs == 9)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("size", [(576, 1001), (2048, 3072), (8192, 640)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_products_with_their_surroundings_on_a_gpu(dtype, rows, size, biased):
    K, N = size
    fused, bound = kernels_for("cuda"), 1e-3 if dtype == torch.float32 else 1e-2
    x, norm = torch.randn(rows, K, device="cuda", dtype=dtype), torch.randn(K, device="cuda", dtype=dtype)
    weight = (torch.randn(2 * N, K, device="cuda") / math.sqrt(K)).to(dtype)
    bias = torch.randn(2 * N, device="cuda", dtype=dtype) if biased else None
    for name in ("norm_linear", "norm_swiglu"):
        got, expected = (getattr(ops, name)(x, norm, 1e-5, weight, bias) for ops in (fused, twin))
        assert relative(got, expected) < bound, name
    streams = [torch.ones(rows, 2 * N, device="cuda", dtype=dtype) for _ in range(2)]
    fused.add_linear(streams[0], x, weight, bias)
    twin.add_linear(streams[1], x, weight, bias)
    assert relative(*streams) < bound


@GPU
def test_choosing_on_a_gpu():
    fused = kernels_for("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(6, 9001, device="cuda").to(dtype)
        logits[2], logits[3, 8000] = logits[2, 0].clone(), float("nan")
        assert torch.equal(fused.argmax(logits), twin.argmax(logits))
    shares, probabilities = draws(fused, "cuda")
    assert ((shares - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / 20_000).sqrt()).all()
    told = [
        torch.tensor([-1, -1, 9, 5]), torch.tensor([1, 2, 0, -1]), torch.tensor([8, 20, 17, 3]), torch.tensor([40, -1]),
        torch.tensor([7, 70, -1]),
    ]  # fmt: skip
    found = []
    for ops in (fused, twin):
        tables = torch.arange(12, device="cuda", dtype=torch.int32).view(3, 4)
        found.append([*ops.gather_inputs(*(t.to("cuda", torch.int32) for t in told), tables, 8), tables])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@GPU
@pytest.mark.parametrize("used", [3, 9000])
def test_the_hosts_buffers_on_a_gpu(used):
    fused = kernels_for("cuda")
    assert turns(fused, "cuda", used + 2, used) == turns(twin, "cpu", used + 2, used)
