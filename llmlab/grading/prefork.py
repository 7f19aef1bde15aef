"""Grading processes that begin with their imports done: one clean server imports them once and forks for each submission.

The server starts with an empty environment and is told nothing but what to import, so its forks have nothing to hide.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llmlab.grading.sandbox import ONE_THREAD
from llmlab.grading.zygote import die_with_parent

START = "import sys; from llmlab.grading.prefork import main; main(sys.argv[1], int(sys.argv[2]))"


class Prefork:
    """Starts processes that serve on a socket."""

    def __init__(self, serve: Callable[[int], None], preload: Sequence[str] = ()) -> None:
        """``serve``, a function of a module, is what a process does with its socket's descriptor."""
        self._near, far = socket.socketpair()
        with far:
            environment = {"PATH": os.defpath, "LANG": "C.UTF-8", **ONE_THREAD}
            name = f"{serve.__module__}:{serve.__qualname__}"
            command = [sys.executable, "-I", "-c", START, name, str(far.fileno())]
            self._server = subprocess.Popen(
                command, env=environment, pass_fds=(far.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._near.sendall(json.dumps(list(preload)).encode() + b"\n")

    def start(self) -> tuple[socket.socket, int]:
        """A new process: the socket on which it serves, and its id. Raises OSError where the server has ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._near, [b"+"], [theirs.fileno()])
        said = self._near.recv(32)
        if not said:
            ours.close()
            raise OSError("the server of grading processes has ended")
        return ours, int(said)

    def end(self) -> None:
        self._near.close()
        self._server.kill()
        self._server.wait()


def main(name: str, descriptor: int) -> None:
    """The server's life: import, then fork for each request until the other end closes."""
    die_with_parent()
    requests = socket.socket(fileno=descriptor)
    module, _, function = name.partition(":")
    serve: Callable[[int], Any] = getattr(importlib.import_module(module), function)
    line = b""
    while not line.endswith(b"\n"):
        line += requests.recv(1)
    for wanted in json.loads(line):
        # A module runs when it is imported and may raise anything; then whoever needs it imports it, and learns why.
        with contextlib.suppress(Exception):
            importlib.import_module(wanted)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not data:
            return
        child = os.fork()
        if child == 0:
            die_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            serve(descriptors[0])
            os._exit(0)
        os.close(descriptors[0])
        requests.sendall(str(child).encode().ljust(32))
