"""Filling a step's budget with tokens of prompts, in the order in which the requests came."""

from __future__ import annotations

from math import inf

from llmlab.batching.state import State, StepPlan


def fill_with_context(plan: StepPlan, state: State, budget: int, most: int | None = None) -> int:
    """Add chunks of prompts in progress, at most ``most`` tokens of each; what comes back is left of the budget."""
    for request in state.in_context():
        if budget <= 0:
            break
        budget -= state.add_chunk(plan, request, budget if most is None else min(budget, most))
    return budget


def admit_and_fill(
    plan: StepPlan, state: State, budget: int, most: int | None = None, whole: int = 0, most_running: float = inf
) -> None:
    """Admit waiting requests while there is budget, and add their chunks; nobody in a step that preempts.

    most: tokens of one prompt. whole: a prompt of up to so many tokens is not cut: where it does not fit into the budget,
    it and all behind it wait for the next step. most_running: requests.
    """
    while not plan.preempted and budget > 0 and state.waiting and len(state.running) < most_running:
        if budget < len(state.waiting[0].token_ids) <= whole:
            break
        request = state.admit()
        if request is None:
            break
        budget -= state.add_chunk(plan, request, budget if most is None else min(budget, most))
