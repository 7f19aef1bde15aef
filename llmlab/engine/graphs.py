"""CUDA graphs of steps: captured once for each of a few sizes, replayed for any step that fits when padded.

A decode step's size is its sequences, and one graph does all of it; a mixed step's its tokens, which SplitFuse keeps at
the budget. There the head has a graph of its own, as few of the tokens yield one.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llmlab.engine.inputs import StepShape

if TYPE_CHECKING:
    from llmlab.engine.runner import Runner

SEQUENCES = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4096, 32))
TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # more keep the device longer than their launches the host


class Graphs:
    """The graphs of a runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        largest = runner.largest
        self._rows = [n for n in SEQUENCES if n < largest.decodes] + [largest.decodes]
        self._tokens = [n for n in TOKENS if n < largest.tokens] + [largest.tokens] * (largest.tokens <= TOKENS[-1])
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def padded(self, shape: StepShape) -> StepShape:
        """The smallest captured shape that holds this one; a step too large for any keeps its own."""
        if not shape.chunks:
            rows = self._rows[bisect.bisect_left(self._rows, shape.decodes)]
            return StepShape(rows, rows, 0, 0)
        at = bisect.bisect_left(self._tokens, shape.tokens)
        return self._runner.mixed_shape(self._tokens[at]) if at < len(self._tokens) else shape

    def run(self, shape: StepShape, yields: int, head: bool) -> None:
        """`Runner.body` of a padded shape and, if asked for, `Runner.head` of the largest logits."""
        rows = self._rows[bisect.bisect_left(self._rows, max(yields, 1))]
        if not shape.chunks and head:
            self._graphs["step", shape.tokens].replay()
            return
        if shape.chunks and shape.tokens > self._tokens[-1]:
            self._runner.body(shape, self._runner.max_num_seqs)
        else:
            self._graphs["mixed" if shape.chunks else "decode", shape.tokens].replay()
        if head and yields:
            self._graphs["head", rows].replay()

    def capture(self) -> None:
        """Capture every graph, the largest first, so that the smaller ones find room in its memory."""
        gc.collect()  # the graphs of an engine that is no more: to free one while another is captured breaks that
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._capture_all()
        finally:
            if collecting:
                gc.enable()
            self._runner.start_over()

    @torch.inference_mode()
    def _capture_all(self) -> None:
        runner = self._runner
        for tokens in reversed(self._tokens):
            shape = runner.mixed_shape(tokens)
            runner.idle(shape)
            self._capture(("mixed", tokens), partial(runner.body, shape, runner.max_num_seqs))
        for rows in reversed(self._rows):
            shape = StepShape(rows, rows, 0, 0)
            runner.idle(shape)
            self._capture(("decode", rows), partial(runner.body, shape, rows))
            self._capture(("head", rows), partial(runner.head, rows))
            self._capture(("step", rows), partial(runner.step, shape, rows))

    def _capture(self, key: tuple[str, int], run: Callable[[], None]) -> None:
        run()  # compiles what is to be captured, and lets libraries take their workspaces
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph
