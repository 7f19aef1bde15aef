"""Policies of batching, one a file, behind one protocol: ``schedule(state) -> StepPlan``."""

from llmlab.batching.policies.orca import OrcaBatching
from llmlab.batching.policies.prefill_first import PrefillFirst
from llmlab.batching.policies.splitfuse import SplitFuse
from llmlab.batching.policies.static import StaticBatching

__all__ = ["OrcaBatching", "PrefillFirst", "SplitFuse", "StaticBatching"]
