"""A discrete-event simulator: the engine's state and policies, on a clock that a cost model turns.

Left out: the host's own time (with ``ahead`` it would hide behind the step; put it into the cost model's fixed part
otherwise), and anything that makes two steps with one plan take different times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import count

from llmlab.arguments import checked, instance_of, number
from llmlab.batching.cost_models import CostModel
from llmlab.batching.metrics import Metrics
from llmlab.batching.request import Request
from llmlab.batching.state import KVManager, Policy, State

_seconds = number(at_least=0)


@checked(ahead=instance_of(bool))
def simulate(
    requests: Iterable[Request],
    policy: Policy,
    cost_model: CostModel,
    kv: KVManager,
    max_num_seqs: int = 256,
    ahead: bool = False,
) -> Metrics:
    """Serve ``requests``, each from its arrival on to its ``max_new_tokens``, and return what happened when.

    A step takes ``cost_model.seconds(plan, kv_tokens)``, and its tokens come at its end; kv_tokens counts the keys that
    it reads, those of its own tokens included. The clock starts at 0, in seconds.

    policy: one of ``llmlab.batching.policies``, or any object with ``schedule(state) -> StepPlan``.
    kv: a fresh block manager or contiguous reservation; it is empty again afterwards.
    ahead: schedule and launch a step while the one before it still runs, as the engine does: the policy then does not
    see what came in, or ended, meanwhile.

    The requests given are not changed: the run works on copies, so that one list serves several policies. Generated
    token ids are -1, -2, …, no two alike, so that only prompts can be found in a prefix cache. A request that the cache
    cannot hold is refused when it arrives; ``Metrics.requests`` has the reason. Raises RuntimeError for a policy that
    computes nothing while there is work and no request is still to come, and ValueError for a request id used twice or a step
    of less than no time.
    """
    coming = deque(sorted(requests, key=lambda r: r.arrival))
    state, metrics, token_ids = State(kv, max_num_seqs), Metrics(), count(-1, -1)
    now = 0.0
    flying: tuple[list[Request], float] | None = None  # who gets a token from the step under way, and when

    while coming or state.waiting or state.running:
        while coming and coming[0].arrival <= now:
            asked = coming.popleft()
            prompt = asked.token_ids[: asked.num_prompt]
            request = Request(asked.request_id, prompt, asked.max_new_tokens, asked.arrival, asked.sampling)
            metrics.arrived(request)
            if not state.add(request):
                metrics.ended(request)

        plan = policy.schedule(state)
        launched = None
        if plan:
            yielding = state.launch(plan)
            work = [(r.request_id, 1) for r in plan.decodes] + [(r.request_id, n) for r, n in plan.chunks]
            seconds = cost_model.seconds(plan, sum(r.computed_tokens for r in plan.requests))
            _seconds("seconds of the cost model", seconds)
            start = flying[1] if flying else now
            metrics.step(start, seconds, work, plan.padding)
            metrics.held(start, *state.slots_held())
            launched = (yielding, start + seconds)
        elif flying is None:
            if coming:
                now = coming[0].arrival
            elif state.waiting or state.running:
                raise RuntimeError(_stuck(policy, state))

        if not ahead:
            flying = launched
        if flying:
            yielding, now = flying
            taken = state.commit(yielding, [next(token_ids) for _ in yielding])
            for request in taken:
                metrics.token(request, now)
                if request.finish_reason:
                    metrics.ended(request)
            metrics.held(now, *state.slots_held())
        flying = launched if ahead else None
    return metrics


def _stuck(policy: Policy, state: State) -> str:
    return (
        f"{type(policy).__name__} computes nothing, {len(state.waiting)} request(s) wait, {len(state.running)} run, "
        f"and no other is to come: it would stay so for ever"
    )
