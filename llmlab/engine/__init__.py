"""The engine: many requests at once on one device."""

from llmlab.engine.engine import Engine
from llmlab.engine.params import SamplingParams
from llmlab.engine.results import Completion, StepTimes

__all__ = ["Completion", "Engine", "SamplingParams", "StepTimes"]
