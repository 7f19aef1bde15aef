"""The process that runs a student's cells, inside the sandbox. Nothing that it says is believed without a check.

It answers requests on one socket: run a cell, open a property, end it. A property is served by a fork of the process
as the cells left it, so that a property that hangs, crashes or changes a global costs itself only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from llmlab.grading.wire import Channel, Reference, WireError, WorkerGone
from llmlab.grading.withhold import withhold
from llmlab.grading.zygote import die_with_parent

SHOWN = 200  # characters of an object's repr that cross
MOST_TEXT = 200_000  # characters of output that a cell may keep
KEPT_TYPES = ("text/plain", "image/png", "application/vnd.llmlab.measurement+json")
PLAIN = (bool, int, float, str)


class Collected:
    """The outputs of the cell that runs, as a notebook stores them; past the limit they are dropped and it is said."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self._left = MOST_TEXT

    def add(self, output: dict[str, Any], size: int) -> None:
        if self._left <= 0:
            return
        self._left -= size
        if self._left <= 0:
            output = {"output_type": "stream", "name": "stdout", "text": "\n[more output than is kept]\n"}
        last = self.outputs[-1] if self.outputs else {}
        if output["output_type"] == "stream" == last.get("output_type") and last["name"] == output["name"]:
            last["text"] += output["text"]
        else:
            self.outputs.append(output)


class Stream:
    """What a cell sees as stdout or stderr."""

    encoding = "utf-8"

    def __init__(self, name: str, shell: Shell) -> None:
        self._name, self._shell = name, shell

    def write(self, text: str) -> int:
        kept = str(text)[:MOST_TEXT]
        self._shell.collected.add({"output_type": "stream", "name": self._name, "text": kept}, len(kept))
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


class _Publisher(DisplayPublisher):  # type: ignore[misc]
    def publish(self, data: dict[str, Any], metadata: Any = None, **_: Any) -> None:
        kept = {k: v for k, v in data.items() if k in KEPT_TYPES}
        if kept:
            output = {"output_type": "display_data", "data": kept, "metadata": {}}
            self.shell.collected.add(output, sum(len(str(v)) for v in kept.values()) // 10)


class _Hook(DisplayHook):  # type: ignore[misc]
    def write_output_prompt(self) -> None: ...

    def write_format_data(self, format_dict: dict[str, Any], md_dict: Any = None) -> None:
        self.shell.display_pub.publish(format_dict)


class Shell(InteractiveShell):  # type: ignore[misc]
    """IPython without a terminal, a history or a profile: magics, display and last-line results work."""

    display_pub_class = _Publisher
    displayhook_class = _Hook
    colors = "nocolor"

    def __init__(self) -> None:
        config = Config()
        config.HistoryManager.enabled = False
        super().__init__(config=config)
        self.collected = Collected()

    def init_io(self) -> None: ...

    def enable_gui(self, gui: Any = None) -> None: ...

    def run(self, source: str) -> dict[str, Any]:
        """Run one cell; says whether it went well, its outputs, and the error where there was one."""
        self.collected = Collected()
        with (
            contextlib.redirect_stdout(Stream("stdout", self)),
            contextlib.redirect_stderr(Stream("stderr", self)),
        ):
            result = self.run_cell(source, store_history=True)
        error = result.error_before_exec or result.error_in_exec
        said = None if error is None else {"name": type(error).__name__, "message": _text(error)}
        return {"ok": error is None, "error": said, "outputs": self.collected.outputs}

    def _showtraceback(self, etype: Any, evalue: Any, stb: list[str]) -> None:
        print("\n".join(str(line) for line in stb))


class Property:
    """Serves the calls of one property, in a fork of the worker."""

    def __init__(self, names: dict[str, Any], channel: Channel) -> None:
        self._names, self._channel = names, channel
        self._objects: list[Any] = []

    def serve(self) -> None:
        """Answer until the other end closes."""
        with contextlib.suppress(WorkerGone):
            while True:
                try:
                    reply = {"value": self._answer(self._channel.receive(self._resolve))}
                except WorkerGone:
                    raise
                except BaseException as error:  # noqa: BLE001  whatever a student's function raises is its answer
                    reply = {"error": _error(error)}
                try:
                    self._channel.send(reply, self._refer)
                except WireError as error:
                    self._channel.send({"error": _error(error)})

    def _answer(self, request: dict[str, Any]) -> Any:
        operations: dict[str, Callable[..., Any]] = {"get": self._get, "call": self._call, "attribute": getattr}
        return operations[request["do"]](*request["with"])

    def _get(self, name: str) -> Any:
        if name not in self._names:
            raise NameError(f"name {name!r} is not defined")
        return self._names[name]

    def _call(self, target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        function = self._get(target) if type(target) is str else target
        return function(*arguments, **named)

    def _refer(self, value: Any) -> Reference:
        self._objects.append(value)
        return Reference(len(self._objects) - 1, type(value).__qualname__, _text(value, repr), callable(value))

    def _resolve(self, reference: Reference) -> Any:
        return self._objects[reference.number]


def serve(control: Channel) -> None:
    """Answer requests until the other end closes."""
    shell = Shell.instance()
    with contextlib.suppress(WorkerGone):
        while True:
            request = control.receive()
            if request["do"] == "run":
                control.send(shell.run(request["source"]))
            elif request["do"] == "names":
                control.send(_describe(shell.user_ns, request["of"]))
            elif request["do"] == "withhold":
                withhold(request["names"])
                control.send(True)
            elif request["do"] == "checkpoint":
                _serve_checkpoint(control)
            elif request["do"] == "modules":
                own = ("__main__", "__mp_main__")
                control.send([name for name in sys.modules if name.partition(".")[0] not in own])
            else:
                _serve_property(shell.user_ns, control)


def _serve_checkpoint(control: Channel) -> None:
    """Fork; the child keeps the state of this moment and answers for it on a socket of its own."""
    connection = _received(control)
    if os.fork() == 0:
        control.close()
        serve(Channel(connection))
        os._exit(0)
    connection.close()


def _received(control: Channel) -> socket.socket:
    _, descriptors, _, _ = socket.recv_fds(control.connection, 1, 1)
    return socket.socket(fileno=descriptors[0])


def _serve_property(names: dict[str, Any], control: Channel) -> None:
    """Fork; the child serves the property on a socket of its own, the parent waits for the word that it is over."""
    connection = _received(control)

    def serve() -> None:
        control.close()
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        Property(names, Channel(connection)).serve()

    with (_forked if _may_signal() else _forked_by_thread)(serve) as child:
        connection.close()
        control.receive()
    _, status = os.waitpid(child, 0)
    control.send({"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0})


def _may_signal() -> bool:
    """Whether the filter of system calls lets this process signal others: it may let the first one signal itself."""
    try:
        for process in (os.getpid(), os.getppid()):
            os.kill(process, 0)
    except OSError:
        return False
    return True


def _fork(serve: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            serve()
        finally:
            os._exit(0)
    return child


@contextlib.contextmanager
def _forked(serve: Callable[[], None]) -> Iterator[int]:
    """A child for the block."""
    child = _fork(serve)
    yield child
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


@contextlib.contextmanager
def _forked_by_thread(serve: Callable[[], None]) -> Iterator[int]:
    """The same without a signal of one's own: the kernel ends the child with the thread that made it."""
    forked: Future[int] = Future()
    over = threading.Event()

    def serve_and_end_with_thread() -> None:
        die_with_parent()
        serve()

    def make() -> None:
        try:
            forked.set_result(_fork(serve_and_end_with_thread))
        except OSError as error:
            forked.set_exception(error)
        over.wait()

    threading.Thread(target=make).start()
    try:
        yield forked.result()
    finally:
        over.set()


def _describe(names: dict[str, Any], asked: list[str]) -> dict[str, Any]:
    """The names that are defined: plain ones with their values, the others are called or asked later."""
    there = {name: names[name] for name in asked if name in names}
    values = {name: value for name, value in there.items() if value is None or type(value) in PLAIN}
    return {"values": values, "objects": [name for name in there if name not in values]}


def _error(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    return {"module": kind.__module__, "name": kind.__qualname__, "message": _text(error)}


def _text(value: Any, how: Callable[[Any], str] = str) -> str:
    try:
        text = str(how(value))
        return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 + 3 :]}"
    except Exception:  # noqa: BLE001  a student's __repr__ may raise anything
        return f"<{type(value).__qualname__}>"


def main(descriptor: int) -> None:
    """Serve on an open socket until it closes."""
    for module in ("llmlab.config", "llmlab.hardware"):
        __import__(module)
    serve(Channel(socket.socket(fileno=descriptor)))
