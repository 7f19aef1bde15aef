"""Where a request's keys and values live: in blocks taken as it grows, or in one region reserved for its longest.

The bookkeeping is exported here, in pure Python; the tensors are in ``llmlab.kv_cache.paged``.
"""

from llmlab.kv_cache.block_manager import BlockManager
from llmlab.kv_cache.block_pool import OutOfBlocks
from llmlab.kv_cache.contiguous import ContiguousReservation

__all__ = ["BlockManager", "ContiguousReservation", "OutOfBlocks"]
