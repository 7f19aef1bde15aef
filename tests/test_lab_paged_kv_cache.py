"""The lab on the paged KV cache: the package answers no exercise."""

import pytest
import torch
from lab_runs import LABS, refuses, ways_in

LAB = LABS["paged_kv_cache"]
SCORES = {  # of 19 points, for the example class
    "student-01": 19,
    "student-02": 0,
    "student-03": 9.5,
    "student-04": 4.75,
    "student-11": 19,
}


# The blocks of a cache, by whatever of the package keeps them; and the attention through a table.
MANAGES = """
def by_the_manager(num_blocks, block_size):
    from llmlab.kv_cache import BlockManager

    return BlockManager(num_blocks, block_size, prefix_caching=False)


def by_the_engines_manager(num_blocks, block_size):
    from llmlab.engine.engine import _manager

    return _manager(num_blocks, block_size, False, 0)


class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.kv, self.size = {way}(num_blocks, block_size), block_size

    def block_table(self, name):
        return list(self.kv.block_table(name))

    def num_free(self):
        return self.kv.num_free_blocks

    def allocate(self, name, num_tokens):
        self.told(self.kv.allocate, name, [0] * num_tokens)

    def append(self, name):
        self.told(self.kv.append, name, 0)
        block, offset = divmod(self.kv.num_tokens(name) - 1, self.size)
        return self.kv.block_table(name)[block] * self.size + offset

    def free(self, name):
        self.kv.free(name)

    def told(self, call, *arguments):
        from llmlab.kv_cache import OutOfBlocks

        try:
            call(*arguments)
        except OutOfBlocks as error:
            raise MemoryError(str(error)) from None
"""
ATTENDS = """
from llmlab.kernels import kernels_for, reference


def by_decodes(q, keys, values, tables, n, out):
    reference.decode_attention(q, keys, values, tables, torch.tensor([0]), n, q.shape[2] ** -0.5, out)


def by_the_kernels_of_a_device(q, keys, values, tables, n, out):
    kernels_for("cpu").decode_attention(q, keys, values, tables, torch.tensor([0]), n, q.shape[2] ** -0.5, out)


def by_a_step(q, keys, values, tables, n, out):
    reference.step_attention(q, keys, values, tables, torch.tensor([0]), n, None, None, q.shape[2] ** -0.5, out)


def by_a_chunk(q, keys, values, tables, n, out):
    chunks, tiles = torch.tensor([[0, 1, 0, int(n) - 1]]), torch.zeros(1, 2, dtype=torch.int32)
    reference.chunk_attention(q, keys, values, tables, chunks, tiles, q.shape[2] ** -0.5, out)


def by_the_cache(q, keys, values, tables, n, out):
    from dataclasses import replace
    from types import SimpleNamespace

    from llmlab.config import MODEL_CONFIGS
    from llmlab.kv_cache.paged import PagedCache, StepBatch

    blocks, kv_heads, size, d = keys.shape
    config = replace(MODEL_CONFIGS["llama-3-8b"], num_layers=1, num_heads=q.shape[1], num_kv_heads=kv_heads, head_size=d)
    cache = PagedCache(config, blocks, size, torch.device("cpu"), keys.dtype)
    cache.keys[0], cache.values[0] = keys, values
    none = torch.tensor([-1])
    attention = cache.attention(StepBatch(none, torch.tensor([0]), torch.tensor([0]), n), tables)
    cos_sin = torch.stack([torch.ones(1, d // 2), torch.zeros(1, d // 2)], 1)
    qkv = torch.cat([q.flatten(1), torch.zeros(1, 2 * kv_heads * d, dtype=q.dtype)], 1)
    layer = SimpleNamespace(index=0, q_norm=None, k_norm=None, eps=0.0)
    out.copy_(attention(layer, qkv, cos_sin).view_as(out))


def paged_attention(q, keys, values, block_table, num_tokens):
    out = torch.empty_like(q)[None]
    {way}(q[None], keys, values, torch.tensor([block_table]), torch.tensor([num_tokens]), out)
    return out[0]
"""


@pytest.mark.parametrize("way", ways_in(MANAGES))
def test_no_way_through_the_package_to_a_block_table_is_open(way):
    given, answer = {}, MANAGES.replace("{way}", way)
    exec(answer, given)
    blocks = given["BlockTables"](8, 4)  # it would be an answer
    blocks.allocate("a", 7)
    slots = [blocks.append("a") for _ in range(2)]
    assert slots == [4 * blocks.block_table("a")[1] + 3, 4 * blocks.block_table("a")[2]]
    refuses(LAB, "BlockTables", answer)


@pytest.mark.parametrize("way", ways_in(ATTENDS))
def test_no_way_through_the_package_to_attention_over_a_table_is_open(way):
    given, answer = {"torch": torch}, ATTENDS.replace("{way}", way)
    exec(answer, given)
    keys, values = torch.randn(2, 5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    q, table = torch.ones(4, 6), [3, 1]
    k, v = (c[table].transpose(0, 1).flatten(1, 2)[:, :7].repeat_interleave(2, 0)[None] for c in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(q[None, :, None], k, v)[0, :, 0]
    assert given["paged_attention"](q, keys, values, table, 7).allclose(expected, atol=1e-6)  # it would be an answer
    refuses(LAB, "paged_attention", answer)
