"""Dynamic SplitFuse: long prompts are split over steps, short ones fused, and each step filled to one token budget.

Source: Holmes et al., "DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference",
2024, arXiv:2401.08671.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.arguments import integer
from llmlab.batching.policies.fill import admit_and_fill, fill_with_context
from llmlab.batching.state import State, StepPlan


@dataclass
class SplitFuse:
    """Running decodes first, then prompts in progress, then new ones, until the budget is full.

    max_num_batched_tokens: of a step, prompts and decodes together. max_prompt_chunk: most tokens of one prompt in a
    step, so that a short prompt can overtake a long one; None for as many as fit, and first come, first served.
    """

    max_num_batched_tokens: int
    max_prompt_chunk: int | None = None

    def __post_init__(self) -> None:
        integer(at_least=1)("max_num_batched_tokens", self.max_num_batched_tokens)
        if self.max_prompt_chunk is not None:
            integer(at_least=1)("max_prompt_chunk", self.max_prompt_chunk)

    def schedule(self, state: State) -> StepPlan:
        plan = StepPlan()
        plan.decodes = state.with_slots(state.decoding(), plan)
        budget = self.max_num_batched_tokens - len(plan.decodes)
        budget = fill_with_context(plan, state, budget, self.max_prompt_chunk)
        admit_and_fill(plan, state, budget, self.max_prompt_chunk)
        return plan
