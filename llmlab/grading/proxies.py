"""What a test cell holds in place of a student's functions, classes and objects: calls cross, the objects stay there."""

from __future__ import annotations

import builtins
import contextlib
import socket
from typing import Any

from llmlab.grading.wire import Channel, Reference, WireError, WorkerGone, find_class


class StudentError(Exception):
    """What a student's code raised, where its type is none of Python's or llmlab's own; or the end of its process."""


class OpenProperty:
    """The worker's fork that serves the property being tested."""

    def __init__(self) -> None:
        self._near, self.far = socket.socketpair()
        self._channel = Channel(self._near)

    def ask(self, operation: str, *arguments: Any) -> Any:
        """The value of one request; raises what the student's code raised."""
        try:
            self._channel.send({"do": operation, "with": arguments}, _as_reference)
            reply = self._channel.receive(lambda reference: Handle(self, reference))
        except WorkerGone:
            raise StudentError("the process of your code ended (a crash, or more memory than it may have)") from None
        if type(reply) is not dict or set(reply) not in ({"value"}, {"error"}):
            raise StudentError("an answer that is none")
        if "error" in reply:
            raise as_exception(reply["error"])
        return reply["value"]

    def close(self) -> None:
        self._near.close()
        self.far.close()


class Handle:
    """An object in the worker: call it, read its attributes, call its methods. Valid in its own property only."""

    def __init__(self, opened: OpenProperty, reference: Reference) -> None:
        self._opened, self._reference = opened, reference

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._opened.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._opened.ask("attribute", self, name)

    def __repr__(self) -> str:
        return f"{self._reference.shown} (a {self._reference.type_name})"


class Name:
    """A function or class that the student defined, by its name; each property calls it in a fork of its own."""

    def __init__(self, name: str, session: Session) -> None:
        self._name, self._session = name, session

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._session.opened().ask("call", self._name, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        opened = self._session.opened()
        return opened.ask("attribute", opened.ask("get", self._name), name)

    def __repr__(self) -> str:
        return f"{self._name} of the submission"


class Session:
    """Knows which property is open."""

    def __init__(self) -> None:
        self.current: OpenProperty | None = None

    def opened(self) -> OpenProperty:
        if self.current is None:
            raise StudentError("the process of your notebook ended before it came to this")
        return self.current


def as_exception(error: Any) -> Exception:
    """The exception that the worker describes, where it is one of Python's or llmlab's own; else a StudentError."""
    if type(error) is not dict or {type(part) for part in error.values()} != {str}:
        return StudentError("an error that is none")
    module, name, message = (error.get(key, "") for key in ("module", "name", "message"))
    kind = vars(builtins).get(name) if module == "builtins" else find_class(f"{module}.{name}")
    # The checks raise TimeoutError themselves, and tell it apart.
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, TimeoutError):
        with contextlib.suppress(TypeError):  # a constructor that takes more than a message
            return kind(message)
    return StudentError(f"{name}: {message}" if message else name)


def _as_reference(value: Any) -> Reference:
    if type(value) is Handle:
        return value._reference
    if type(value) is Name:
        opened = value._session.opened()
        found: Handle = opened.ask("get", value._name)
        return found._reference
    raise WireError(f"a {type(value).__name__} of the tests is no plain data and cannot cross")
