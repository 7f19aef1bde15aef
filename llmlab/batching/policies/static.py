"""Static batching: a batch is formed, and the next one when its longest output has ended."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from llmlab.arguments import integer
from llmlab.batching.policies.fill import fill_with_context
from llmlab.batching.state import State, StepPlan


@dataclass
class StaticBatching:
    """Requests join and leave together, as in a loop over ``generate``.

    Prompts are padded to the batch's longest, and a finished sequence is computed until the last one ends; both are
    counted in ``StepPlan.padding``, a prompt's in the step that computes its last token. batch_size: sequences.
    max_num_batched_tokens: in a step, padding apart; prompts that are more together take several steps.
    """

    batch_size: int
    max_num_batched_tokens: int = 8192

    def __post_init__(self) -> None:
        integer(at_least=1)("batch_size", self.batch_size)
        integer(at_least=1)("max_num_batched_tokens", self.max_num_batched_tokens)
        self._padding: dict[Hashable, int] = {}  # of each prompt in the batch

    def schedule(self, state: State) -> StepPlan:
        plan = StepPlan()
        if not state.running:
            most = min(self.batch_size, self.max_num_batched_tokens)
            while len(state.running) < most and state.admit():
                pass
            longest = max((r.remaining for r in state.running), default=0)
            self._padding = {r.request_id: longest - r.remaining for r in state.running}
        fill_with_context(plan, state, self.max_num_batched_tokens)
        if plan.chunks:
            plan.padding = sum(self._padding[r.request_id] for r, count in plan.chunks if count == r.remaining)
        else:
            plan.decodes = state.with_slots(state.decoding(), plan)
            plan.padding = len(self._padding) - len(plan.decodes) if plan.decodes else 0
        return plan
