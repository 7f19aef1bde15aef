"""Running a pipeline schedule: each rank does its operations in order, and sends on what they make."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmlab.parallel.schedules import Operation, Receive, Schedule, Send, lower, validate
from llmlab.parallel.weight_steps import WeightSteps

Loss = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Ran:
    """An operation as it ran: seconds on a clock that all processes of a machine share."""

    operation: Operation
    start: float
    end: float


@dataclass
class Record:
    """What one step of a pipeline did on this rank.

    ran: its operations. sent_bytes: what went to other ranks. until_backward, until_weight: the most activations that
    were held at a time, as ``activations_in_flight`` counts them.
    """

    ran: list[Ran] = field(default_factory=list)
    sent_bytes: int = 0
    until_backward: int = 0
    until_weight: int = 0


class Pipeline:
    """This rank's chunks of a model, run by a schedule.

    After ``step`` each parameter's ``grad`` has the gradient of the mean loss over the micro-batches, as if the model
    had been run in one piece on one device.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        schedule: Schedule,
        mesh: DeviceMesh,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        loss: Loss | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """chunks: this rank's stages, in the order of ``schedule.stage_of(rank, chunk)``.

        shape, dtype: of what one stage hands to the next for one micro-batch. loss: (output of the last stage, target)
        to a scalar, the mean over the micro-batch; not needed for inference. clock: what dates operations; on a GPU one
        that does not wait for the device sees launches only.
        Raises ValueError for another number of chunks or ranks, or no loss; ScheduleError for a schedule that cannot
        run.
        """
        self.rank, ranks = mesh.get_local_rank(), mesh.size()
        if schedule.p != ranks:
            raise ValueError(f"schedule: it is for {schedule.p} ranks, and the mesh has {ranks}")
        if len(chunks) != schedule.v:
            raise ValueError(f"chunks: expected {schedule.v}, as the schedule has for a rank, got {len(chunks)}")
        if "B" in schedule.kinds and loss is None:
            raise ValueError("loss: expected one, as the schedule has a backward")
        programs = lower(schedule)
        validate(programs)
        self.schedule, self.chunks, self.loss, self.clock = schedule, list(chunks), loss, clock
        self.group, self.device = mesh.get_group(), torch.device(mesh.device_type)
        self.peers = dist.get_process_group_ranks(self.group)
        self.shape, self.dtype = tuple(shape), dtype
        self.program = programs.steps[self.rank]
        self.weight_steps = WeightSteps()
        if schedule.splits_backward:
            for chunk in self.chunks:
                self.weight_steps.defer(chunk)

    def step(self, inputs: Sequence[Tensor] = (), targets: Sequence[Any] = ()) -> tuple[list[Tensor], Record]:
        """Run the schedule once; what the last stage made of each micro-batch, and a record of this rank.

        inputs, targets: one for each micro-batch; needed on the rank of the first stage, and on that of the last.
        Returns the losses, or for inference the outputs, on the rank of the last stage, and no tensor elsewhere.
        Raises ValueError where their number is not m.
        """
        m, last = self.schedule.m, self.schedule.num_stages - 1
        if self.schedule.rank_of(0) == self.rank and len(inputs) != m:
            raise ValueError(f"inputs: expected {m} micro-batches, got {len(inputs)}")
        if self.loss is not None and self.schedule.rank_of(last) == self.rank and len(targets) != m:
            raise ValueError(f"targets: expected {m}, one for each micro-batch, got {len(targets)}")
        with torch.set_grad_enabled("B" in self.schedule.kinds):
            return _Step(self, inputs, targets).run()


class _Step:
    """One run: what is under way."""

    def __init__(self, pipeline: Pipeline, inputs: Sequence[Tensor], targets: Sequence[Any]) -> None:
        self.of, self.schedule = pipeline, pipeline.schedule
        self.inputs, self.targets = inputs, targets
        self.last = self.schedule.num_stages - 1
        self.arrived: dict[tuple[str, int, int], tuple[Any, Tensor]] = {}  # by kind, micro-batch and stage
        self.made: dict[tuple[str, int, int], Tensor] = {}  # by kind, micro-batch and the stage that it is for
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # input and output, by micro-batch and stage
        self.weights: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.sends: list[tuple[Any, Tensor]] = []
        self.results: dict[int, Tensor] = {}
        self.record = Record()

    def run(self) -> tuple[list[Tensor], Record]:
        for step in self.of.program:
            if isinstance(step, Send):
                tensor = self.made.pop((step.kind, step.micro_batch, step.stage)).contiguous()
                self.record.sent_bytes += tensor.numel() * tensor.element_size()
                self.sends.append((dist.isend(tensor, self.of.peers[step.peer], self.of.group), tensor))
            elif isinstance(step, Receive):
                tensor = torch.empty(self.of.shape, dtype=self.of.dtype, device=self.of.device)
                work = dist.irecv(tensor, self.of.peers[step.peer], self.of.group)
                self.arrived[step.kind, step.micro_batch, step.stage] = (work, tensor)
            else:
                self._compute(step)
        for work, _ in self.sends:
            work.wait()
        return [self.results[j] for j in sorted(self.results)], self.record

    def _compute(self, operation: Operation) -> None:
        kind, j, chunk = operation
        stage = self.schedule.stage_of(self.of.rank, chunk)
        taken = self._take(kind, j, stage)
        start = self.of.clock()
        if kind == "F":
            self._forward(j, stage, chunk, taken)
        elif kind == "B":
            self._backward(j, stage, taken)
        else:
            for step in self.weights.pop((j, stage)):
                step()
        self.record.ran.append(Ran(operation, start, self.of.clock()))

    def _take(self, kind: str, j: int, stage: int) -> Tensor | None:
        """What an operation works on, once it is there: of another rank, or of this one."""
        if kind == "W":
            return None
        if kind == "F" and stage == 0:
            return self.inputs[j]
        if (kind, j, stage) in self.arrived:
            work, tensor = self.arrived.pop((kind, j, stage))
            work.wait()
            return tensor
        return self.made.pop((kind, j, stage), None)

    def _forward(self, j: int, stage: int, chunk: int, x: Tensor | None) -> None:
        assert x is not None
        training = torch.is_grad_enabled()
        if training and x.is_floating_point():
            x = x.detach().requires_grad_()
        y = self.of.chunks[chunk](x)
        if stage == self.last:
            self.results[j] = y.detach()
            if training:
                assert self.of.loss is not None
                y = self.of.loss(y, self.targets[j])
                self.results[j] = y.detach()
                y = y / self.schedule.m
        else:
            self.made["F", j, stage + 1] = y.detach()
        if training:
            self.held[j, stage] = (x, y)
        self._note(1)

    def _backward(self, j: int, stage: int, gradient: Tensor | None) -> None:
        x, y = self.held[j, stage]
        torch.autograd.backward(y, gradient)
        self._note(0)
        del self.held[j, stage]
        if self.schedule.splits_backward:
            self.weights[j, stage] = self.of.weight_steps.take()
        if stage > 0:
            assert x.grad is not None
            self.made["B", j, stage - 1] = x.grad

    def _note(self, forwards: int) -> None:
        held = max(len(self.held), forwards)
        self.record.until_backward = max(self.record.until_backward, held)
        self.record.until_weight = max(self.record.until_weight, held + len(self.weights))
