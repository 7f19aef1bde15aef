"""Grading many submissions at once: each in a process of its own, results as they come."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from llmlab.grading.grade import Bundle, grade_one, to_json
from llmlab.grading.prefork import Prefork
from llmlab.grading.wire import Channel, WireError, WorkerGone
from llmlab.grading.worker import main as serve_worker
from llmlab.grading.zygote import Zygote

MOST_OF_A_BUNDLE = 2**29  # bytes: a notebook of the largest size, escaped twice, and the instructor's
GRACE_SECONDS = 30.0  # for the trusted side, beyond the submission's own time


@dataclass(frozen=True)
class Failure:
    """A submission whose grading went wrong, and how."""

    student: str
    reason: str


Outcome = dict[str, Any] | Failure


class Scheduler(Protocol):
    """Where submissions are graded."""

    def run(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """The outcomes as they come; takes the next bundle when it has room for it."""


class Local:
    """This machine: so many at a time, each in a fresh process that begins with these modules imported.

    Within ``with``, runs share the server that has them imported; otherwise each run starts one.
    """

    def __init__(self, jobs: int | None = None, preload: Sequence[str] = ()) -> None:
        self.jobs = jobs or os.cpu_count() or 1
        self._preload = preload
        self._held: Prefork | None = None

    def __enter__(self) -> Self:
        self._held = Prefork(serve, self._preload)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._held is not None
        self._held.end()
        self._held = None

    def run(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        if self._held is None:
            with self:
                yield from self.run(bundles)
            return
        waiting = iter(bundles)
        running: dict[int, _Job] = {}
        processes = self._held
        ready = selectors.DefaultSelector()
        try:
            while True:
                while len(running) < self.jobs and (bundle := next(waiting, None)) is not None:
                    try:
                        job = _Job(processes, bundle)
                    except (OSError, WireError, WorkerGone) as error:
                        yield Failure(bundle.student, f"grading could not begin: {error}")
                        continue
                    running[ready.register(job.channel.connection, selectors.EVENT_READ).fd] = job
                if not running:
                    return
                answered = {key.fd for key, _ in ready.select(timeout=1.0)}
                late = {fd for fd, job in running.items() if time.monotonic() > job.deadline}
                for fd in answered | late:
                    job = running.pop(fd)
                    ready.unregister(fd)
                    yield job.outcome()
        finally:
            for job in running.values():
                job.kill()
            ready.close()


class _Job:
    def __init__(self, processes: Prefork, bundle: Bundle) -> None:
        self.student = bundle.student
        connection, self._process = processes.start()
        self.channel = Channel(connection, MOST_OF_A_BUNDLE)
        self.channel.send(bundle.to_json())
        self.deadline = time.monotonic() + bundle.limits.seconds + GRACE_SECONDS

    def outcome(self) -> Outcome:
        try:
            said = json.loads(self.channel.receive(seconds=GRACE_SECONDS if time.monotonic() < self.deadline else 0))
        except TimeoutError:
            said = {"failed": "took too long"}
        except (WorkerGone, WireError) as error:
            said = {"failed": f"the grading process failed: {error}"}
        self.kill()
        return said["result"] if "result" in said else Failure(self.student, said["failed"])

    def kill(self) -> None:
        """End the process; its sandboxes die with it."""
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)


def serve(descriptor: int) -> None:
    """What a grading process does. The zygote is made before the bundle comes, so no worker ever has that in memory."""
    zygote = Zygote(serve_worker)
    channel = Channel(socket.socket(fileno=descriptor), MOST_OF_A_BUNDLE)
    try:
        said = f'{{"result":{to_json(grade_one(Bundle.from_json(channel.receive()), zygote))}}}'
    except Exception as error:  # noqa: BLE001  grading one must not end the class; the reason is shown, nothing is recorded
        said = json.dumps({"failed": f"{type(error).__name__}: {error}"})
    finally:
        zygote.end()
    try:
        channel.send(said)
    except WireError as error:
        channel.send(json.dumps({"failed": str(error)}))
