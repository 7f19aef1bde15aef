"""Pipeline schedules as data: what makes them, checks them, times them, and puts the communication in."""

from llmlab.parallel.schedules.activations import Held, activations_in_flight
from llmlab.parallel.schedules.classic import forward_only, gpipe, interleaved, one_f_one_b
from llmlab.parallel.schedules.closed_forms import activations_closed_form, bubble_bound, bubble_closed_form
from llmlab.parallel.schedules.communication import Programs, Receive, Send, lower, lower_naively
from llmlab.parallel.schedules.partition import partition_layers
from llmlab.parallel.schedules.rendezvous import simulate_blocking
from llmlab.parallel.schedules.schedule import Operation, Schedule, ScheduleError
from llmlab.parallel.schedules.simulate import Costs, Span, Timeline, bubble_fraction, simulate
from llmlab.parallel.schedules.validate import validate
from llmlab.parallel.schedules.zero_bubble import zero_bubble

__all__ = [
    "Costs", "Held", "Operation", "Programs", "Receive", "Schedule", "ScheduleError", "Send", "Span", "Timeline",
    "activations_closed_form", "activations_in_flight", "bubble_bound", "bubble_closed_form", "bubble_fraction",
    "forward_only", "gpipe", "interleaved", "lower", "lower_naively", "one_f_one_b", "partition_layers", "simulate",
    "simulate_blocking", "validate", "zero_bubble",
]  # fmt: skip
