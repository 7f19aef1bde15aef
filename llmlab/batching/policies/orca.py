"""Iteration-level scheduling: after each step a finished request leaves and a waiting one takes its place.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.arguments import integer
from llmlab.batching.policies.fill import admit_and_fill, fill_with_context
from llmlab.batching.state import State, StepPlan


@dataclass
class OrcaBatching:
    """Whole prompts and single tokens side by side in each step, first come, first served.

    max_batch_size: sequences in a step. max_num_batched_tokens: what a step holds, which Orca does not bound. A prompt
    that other prompts leave no room for waits for the next step; one that finds no room beside the decodes either is
    cut. Orca itself reserves the maximum length of each request: pass ``ContiguousReservation`` for that.
    """

    max_batch_size: int
    max_num_batched_tokens: int = 8192

    def __post_init__(self) -> None:
        integer(at_least=1)("max_batch_size", self.max_batch_size)
        integer(at_least=1)("max_num_batched_tokens", self.max_num_batched_tokens)

    def schedule(self, state: State) -> StepPlan:
        plan = StepPlan()
        plan.decodes = state.with_slots(state.decoding(), plan)
        room = self.max_num_batched_tokens - len(plan.decodes)
        left = fill_with_context(plan, state, room)
        admit_and_fill(plan, state, left, whole=room, most_running=self.max_batch_size)
        return plan
