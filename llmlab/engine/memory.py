"""How many blocks of keys and values fit: by running the largest step once and looking at what is left."""

from __future__ import annotations

import torch

from llmlab.engine.runner import Runner
from llmlab.kv_cache.paged import PagedCache
from llmlab.model import Transformer

CPU_BYTES = 2**30  # where nothing can be measured
SPARE_BYTES = 512 * 2**20  # CUDA graphs and libraries' workspaces, which come after the measurement


def blocks_that_fit(
    model: Transformer, block_size: int, memory_fraction: float, max_num_seqs: int, max_tokens: int, max_length: int
) -> int:
    """Blocks that the device's memory holds beside the model and the largest step. Raises MemoryError where that is none."""
    parameter = next(model.parameters())
    size = PagedCache.block_bytes(model.config, block_size, parameter.dtype)
    if parameter.device.type != "cuda":
        return max(1, min(CPU_BYTES // size, -(-max_length // block_size) * max_num_seqs))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        runner = Runner(model, 1, block_size, max_num_seqs, max_tokens, max_length, graphs=False)
        with torch.inference_mode():
            runner.idle(runner.largest)
            runner.body(runner.largest, max_num_seqs)
            runner.head(max_num_seqs)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"a step of {max_tokens} tokens and {max_num_seqs} sequences does not fit beside the model: {error}"
        ) from None
    del runner
    step_bytes = torch.cuda.max_memory_allocated() - before
    free, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    room = int(total * memory_fraction) - (total - free) - step_bytes - SPARE_BYTES
    if room < size:
        raise MemoryError(
            f"{room:,} bytes are left for keys and values, less than a block of {size:,}: a smaller model or step"
        )
    return room // size
