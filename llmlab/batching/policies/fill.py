"""Filling a step's budget with tokens of prompts, in the order in which the requests came."""

from __future__ import annotations

from llmlab.batching.request import Request
from llmlab.batching.state import State, StepPlan


def fill_with_context(plan: StepPlan, state: State, budget: int, most: int | None = None) -> int:
    """Add chunks of prompts in progress, at most ``most`` tokens of each; what comes back is left of the budget."""
    for request in state.in_context():
        if budget <= 0:
            break
        budget -= _add_chunk(plan, request, budget, most)
    return budget


def admit_and_fill(
    plan: StepPlan,
    state: State,
    budget: int,
    most: int | None = None,
    whole: int = 0,
    most_running: int | None = None,
) -> None:
    """Admit waiting requests while there is budget, and add their chunks.

    most: tokens of one prompt. whole: a prompt of up to so many tokens is not cut: where it does not fit into the budget,
    it and all behind it wait for the next step. most_running: requests.
    """
    while budget > 0 and state.waiting and (most_running is None or len(state.running) < most_running):
        if budget < len(state.waiting[0].token_ids) <= whole:
            break
        request = state.admit()
        if request is None:
            break
        budget -= _add_chunk(plan, request, budget, most)


def _add_chunk(plan: StepPlan, request: Request, budget: int, most: int | None) -> int:
    """Add as much of a prompt as the budget and ``most`` allow; what comes back is how many tokens that is."""
    count = min(request.remaining, budget if most is None else min(budget, most))
    plan.chunks.append((request, count))
    return count
