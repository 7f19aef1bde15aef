"""A submission's worker as the trusted process sees it: it runs cells, opens properties, and starts over when it dies."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

from llmlab.grading.checks import MEASUREMENT_TYPE
from llmlab.grading.proxies import Name, OpenProperty, Session
from llmlab.grading.sandbox import Running, Sandbox, SandboxError
from llmlab.grading.wire import SEND_SECONDS, Channel, WireError, WorkerGone
from llmlab.grading.zygote import Zygote

PLAIN = (bool, int, float, str)
MOST_OUTPUTS = 1000
MOST_KEPT = 4 * 2**20  # characters of output that are kept of a submission
MOST_REPLY = 2 * MOST_KEPT  # bytes of an answer other than a property's, which its own time limits
MOST_MESSAGE = 2000  # of an error's
SHARE_OF_CELLS = 2 / 3
MOST_RESTARTS = 3
START_SECONDS = 30.0
CLOSING_SECONDS = 5.0


class Worker(Session):
    """Runs a student's cells in a sandbox.

    A cell that hangs or ends the process costs itself: a new worker runs the cells before it again, and goes on behind.
    """

    def __init__(self, sandbox: Sandbox, zygote: Zygote | None = None) -> None:
        super().__init__()
        self.limits = sandbox.limits
        self._room = MOST_KEPT
        self.troubles: set[str] = set()  # "timeout", "crashed", "out of memory"
        self._end = time.monotonic() + sandbox.limits.seconds
        # A part of the time is kept for the hidden properties: a last cell without end must not take it from them.
        self.deadline = time.monotonic() + sandbox.limits.seconds * SHARE_OF_CELLS
        self._kind, self._zygote = sandbox, zygote
        self._ran: list[str | None] = []  # cells, and None for each checkpoint
        self._checkpoints: list[Channel | None] = []
        self._withheld: list[str] = []
        self._restarts = 0
        self._stack = contextlib.ExitStack()
        self._control: Channel | None = None  # who answers: the notebook as it is, or a checkpoint
        self._end_of_notebook: Channel | None = None
        self._sandbox: Running | None = None
        self._start()

    def withhold(self, names: list[str]) -> None:
        """From now on these names of the package raise, before any cell has run. Raises SandboxError where that fails."""
        self._withheld = names
        self._withhold()

    def run(self, source: str) -> dict[str, Any]:
        """Run a cell of the submission; the result has ``ok``, ``error`` and ``outputs``."""
        if self._control is None:
            return _failed("NotRun", "the notebook's process had ended")
        try:
            result = self._request({"do": "run", "source": source}, self.limits.cell_seconds)
            if (checked := _checked(result, self._room)) is not None:
                self._room -= sum(len(str(output)) for output in checked["outputs"])
                self._ran.append(source)
                return checked
            trouble, said = "crashed", _failed("WorkerError", "the cell's process gave an answer that is none")
        except TimeoutError:
            trouble, said = "timeout", _failed("Timeout", "the cell took longer than it may; it was stopped")
        except WorkerGone:
            trouble, said = "crashed", _failed("ProcessEnded", "the cell ended the notebook's process")
        except WireError as error:
            trouble, said = "crashed", _failed("WorkerError", str(error))
        self._mourn(trouble)
        self._start_over()
        return said

    def values(self, names: list[str]) -> dict[str, Any]:
        """What stands for each of the names in a test cell; a name that the submission does not define is left out."""
        if self._control is None:
            return {}
        try:
            there = self._request({"do": "names", "of": names}, CLOSING_SECONDS)
            found = {name: value for name, value in there["values"].items() if type(value) in (*PLAIN, type(None))}
            found |= {name: Name(name, self) for name in there["objects"]}
        except (TimeoutError, WorkerGone, WireError, KeyError, TypeError, AttributeError):
            self._mourn("crashed")
            return {}
        return {name: value for name, value in found.items() if name in names}

    def checkpoint(self) -> None:
        """Keep the state of this moment; `go_to` comes back to it by number."""
        ours, theirs = socket.socketpair()
        try:
            if self._control is None:
                raise WorkerGone("the worker has ended")
            self._control.send({"do": "checkpoint"}, descriptor=theirs.fileno(), seconds=self._patience())
            self._checkpoints.append(Channel(ours, MOST_REPLY))
        except WorkerGone:
            ours.close()
            self._checkpoints.append(None)
        finally:
            theirs.close()
        self._ran.append(None)

    def go_to(self, number: int) -> None:
        """From here on the checkpoint answers. No cell is run any more, and no output read."""
        self._control = self._checkpoints[number]
        self._restarts = MOST_RESTARTS
        self.deadline = self._end

    def modules(self) -> list[str]:
        """The modules that all the cells have loaded, in order; for instructors' own cells."""
        self._control = self._end_of_notebook
        try:
            found = self._request({"do": "modules"}, CLOSING_SECONDS) if self._control else []
        except (TimeoutError, WorkerGone, WireError):
            self._mourn("crashed")
            return []
        return [name for name in found if type(name) is str] if type(found) is list else []

    @contextlib.contextmanager
    def property(self) -> Iterator[None]:
        """Serve the calls of one property from a fork of the worker."""
        if self._control is None:
            yield
            return
        opened = OpenProperty()
        try:
            self._control.send({"do": "property"}, descriptor=opened.far.fileno(), seconds=self._patience())
            opened.far.close()
            self.current = opened
        except WorkerGone:
            self._mourn("crashed")
        try:
            yield
        except TimeoutError:
            self.troubles.add("timeout")
            raise
        finally:
            self.current = None
            opened.close()
            self._close_property()

    def end(self) -> None:
        """Kill everything that the submission has running."""
        self._control = None
        for number, checkpoint in enumerate(self._checkpoints):
            if checkpoint is not None:
                checkpoint.close()
                self._checkpoints[number] = None
        self._stack.close()

    def _close_property(self) -> None:
        if self._control is None:
            return
        try:
            told = self._request({"do": "end"}, CLOSING_SECONDS)
            if type(told) is dict and told.get("signal") not in (0, 9):
                self.troubles.add("crashed")
        except (TimeoutError, WorkerGone, WireError):
            self._mourn("crashed")
            self._start_over()
        if self._sandbox is not None and self._sandbox.ran_out_of_memory():
            self.troubles.add("out of memory")

    def _request(self, request: dict[str, Any], seconds: float) -> Any:
        assert self._control is not None
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the submission's time is up")
        self._control.send(request, seconds=self._patience())
        return self._control.receive(seconds=min(seconds, left))

    def _patience(self) -> float:
        """How long to wait until a message is taken."""
        return max(0.1, min(SEND_SECONDS, self.deadline - time.monotonic()))

    def _start(self) -> None:
        near, far = socket.socketpair()
        self._stack = contextlib.ExitStack()
        self._stack.callback(near.close)
        with far:
            try:
                self._sandbox = self._stack.enter_context(self._kind.worker(far.fileno(), self._zygote))
            except OSError as error:
                raise SandboxError(str(error)) from error
        self._control = self._end_of_notebook = Channel(near, MOST_REPLY)
        try:
            self._request({"do": "names", "of": []}, START_SECONDS)
        except (TimeoutError, WorkerGone, WireError) as error:
            said = self._sandbox.last_words()
            self.end()
            raise SandboxError(said or f"the worker did not start: {error}") from None
        self._withhold()

    def _withhold(self) -> None:
        if not self._withheld:
            return
        try:
            self._request({"do": "withhold", "names": self._withheld}, START_SECONDS)
        except (TimeoutError, WorkerGone, WireError) as error:
            self.end()
            raise SandboxError(f"the lab's answers could not be withheld: {error}") from None

    def _mourn(self, trouble: str) -> None:
        """The worker is dead or not to be had any more: say why, and clear it away."""
        out_of_memory = self._sandbox is not None and self._sandbox.ran_out_of_memory()
        self.troubles.add("out of memory" if out_of_memory else trouble)
        self._control = None
        if self._restarts < MOST_RESTARTS:
            self.end()

    def _start_over(self) -> None:
        """A new worker that has run the same cells, unless it has been tried too often or the time is up."""
        if self._restarts == MOST_RESTARTS or time.monotonic() >= self.deadline:
            return
        self._restarts += 1
        cells, self._ran, self._checkpoints = self._ran, [], []
        try:
            self._start()
            for source in cells:
                if source is None:
                    self.checkpoint()
                    continue
                self._request({"do": "run", "source": source}, self.limits.cell_seconds)
                self._ran.append(source)
        except (TimeoutError, WorkerGone, WireError, SandboxError):
            self._mourn("crashed")


def _checked(result: Any, room: int) -> dict[str, Any] | None:
    """A cell's result with nothing in it but what belongs there, and outputs for which there is room; None for no result."""
    if type(result) is not dict or type(result.get("outputs")) is not list:
        return None
    error = result.get("error")
    if error is not None and not _has(error, name=str, message=str):
        return None
    outputs = []
    for output in filter(None, map(_checked_output, result["outputs"][:MOST_OUTPUTS])):
        room -= len(str(output))
        if room < 0:
            break
        outputs.append(output)
    shown = error and {"name": error["name"][:MOST_MESSAGE], "message": error["message"][:MOST_MESSAGE]}
    return {"ok": error is None, "error": shown, "outputs": outputs}


def _checked_output(output: Any) -> dict[str, Any] | None:
    if _has(output, output_type=str, name=str, text=str) and output["name"] in ("stdout", "stderr"):
        return {"output_type": "stream", "name": output["name"], "text": output["text"]}
    if not _has(output, output_type=str, data=dict, metadata=dict):
        return None
    data = {k: output["data"][k] for k in ("text/plain", "image/png") if type(output["data"].get(k)) is str}
    measurement = output["data"].get(MEASUREMENT_TYPE)
    numbers = ("predicted", "measured")
    if _has(measurement, name=str, predicted=(int, float), measured=(int, float), unit=str) and all(
        math.isfinite(measurement[number]) for number in numbers
    ):
        data[MEASUREMENT_TYPE] = measurement
    return {"output_type": "display_data", "data": data, "metadata": {}} if data else None


def _has(value: Any, **types: Any) -> bool:
    """Whether a value is a dict of just these keys, with values of just these types."""
    return (
        type(value) is dict
        and set(value) == set(types)
        and all(type(value[key]) in (kind if type(kind) is tuple else (kind,)) for key, kind in types.items())
    )


def _failed(name: str, message: str) -> dict[str, Any]:
    return {"ok": False, "error": {"name": name, "message": message}, "outputs": []}
