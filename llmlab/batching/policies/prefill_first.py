"""Prefill first, as the first vLLM scheduled: while a prompt waits and fits, a step computes prompts and nothing else.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023, and
the scheduler published with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.arguments import integer
from llmlab.batching.policies.fill import admit_and_fill, fill_with_context
from llmlab.batching.state import State, StepPlan


@dataclass
class PrefillFirst:
    """A step is of whole prompts, or of single tokens of all that run; prompts go first, and stall the others.

    max_num_batched_tokens: in a step; a prompt that is longer is cut (vLLM's scheduler refused it).
    """

    max_num_batched_tokens: int = 8192

    def __post_init__(self) -> None:
        integer(at_least=1)("max_num_batched_tokens", self.max_num_batched_tokens)

    def schedule(self, state: State) -> StepPlan:
        plan = StepPlan()
        most = self.max_num_batched_tokens
        left = fill_with_context(plan, state, most)
        # As many may run as fit into a step when all of them decode.
        admit_and_fill(plan, state, left, whole=most, most_running=most)
        if not plan.chunks:
            plan.decodes = state.with_slots(state.decoding(), plan)
        return plan
