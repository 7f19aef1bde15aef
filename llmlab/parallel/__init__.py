"""Models over several ranks: tensor parallelism and pipeline parallelism on torch.distributed.

Names are loaded when they are asked for, so that ``llmlab.parallel.schedules`` stays pure Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.parallel.communicator import Communicator
    from llmlab.parallel.launcher import RankError, launch
    from llmlab.parallel.linear import ColumnParallelLinear, RowParallelLinear
    from llmlab.parallel.pipeline import Pipeline
    from llmlab.parallel.plan import llama_plan, parallelize
    from llmlab.parallel.rank import joined
    from llmlab.parallel.threads import in_threads
    from llmlab.parallel.vocabulary import VocabParallelEmbedding, vocab_parallel_cross_entropy

_HOMES = {
    "Communicator": "communicator", "RankError": "launcher", "launch": "launcher", "joined": "rank",
    "ColumnParallelLinear": "linear", "RowParallelLinear": "linear", "Pipeline": "pipeline", "llama_plan": "plan", "parallelize": "plan",
    "in_threads": "threads", "VocabParallelEmbedding": "vocabulary", "vocab_parallel_cross_entropy": "vocabulary",
}  # fmt: skip
__all__ = [
    "ColumnParallelLinear", "Communicator", "Pipeline", "RankError", "RowParallelLinear", "VocabParallelEmbedding", "in_threads", "joined",
    "launch", "llama_plan", "parallelize", "vocab_parallel_cross_entropy",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
