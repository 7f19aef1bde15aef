"""Batching: requests, the policies that choose what a step computes, and a simulator that runs the same policies."""

from llmlab.batching.cost_models import CostModel, FittedCost, LinearCost, RooflineCost
from llmlab.batching.metrics import Metrics
from llmlab.batching.request import Request
from llmlab.batching.simulate import simulate
from llmlab.batching.state import KVManager, Policy, State, StepPlan

__all__ = [
    "CostModel", "FittedCost", "KVManager", "LinearCost", "Metrics", "Policy", "Request", "RooflineCost", "State",
    "StepPlan", "simulate",
]  # fmt: skip
