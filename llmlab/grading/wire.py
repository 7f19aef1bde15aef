"""What may cross between the trusted process and a student's worker: plain data, strictly typed.

A message is one value: JSON in which every part names its type, with the bytes of arrays and tensors (safetensors)
behind it. Reading one builds exact built-in types and llmlab's own dataclasses; it evaluates nothing, unpickles
nothing and imports nothing. What is not plain data stays where it is, and a `Reference` to it crosses.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 64 * 2**20
MOST_DEPTH = 40
MOST_DIGITS = 3500  # of a whole number, hexadecimal; Python writes out no more than 4,300 decimal ones
SEND_SECONDS = 10.0  # for the other end to take a message
HEADER = struct.Struct(">II")  # bytes of JSON, bytes of safetensors


class WireError(ValueError):
    """A message that is too large, not well formed, or holds what may not cross."""


class WorkerGone(EOFError):
    """The other end of the channel is closed."""


@dataclass(frozen=True)
class Reference:
    """Stands for an object that stays in the worker: its number there, its type's name and what it looks like."""

    number: int
    type_name: str
    shown: str
    callable: bool


Refer = Callable[[Any], Reference]
Resolve = Callable[[Reference], Any]


def encode(value: Any, refer: Refer | None = None, most: int = MOST_BYTES) -> bytes:
    """The message of one value. ``refer`` names what is not plain data; without it that is a WireError."""
    arrays: dict[str, Any] = {}
    text = json.dumps(_tree(value, refer, arrays, 0), separators=(",", ":"), allow_nan=False).encode()
    blob = _pack(arrays) if arrays else b""
    if len(text) + len(blob) > most:
        raise WireError(f"{len(text) + len(blob):,} bytes are more than the {most:,} that may cross")
    return HEADER.pack(len(text), len(blob)) + text + blob


def decode(text: bytes, blob: bytes, resolve: Resolve | None = None) -> Any:
    """The value of a message; ``resolve`` turns a reference into what stands for it here."""
    try:
        return _value(json.loads(text), resolve, _unpack(blob) if blob else {}, 0)
    except WireError:
        raise
    except RecursionError:
        raise WireError("a message that is nested too deeply") from None
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise WireError(f"a message that is not well formed: {type(error).__name__}") from error


class Channel:
    """Messages over a socket, with a deadline for each."""

    def __init__(self, connection: socket.socket, most: int = MOST_BYTES) -> None:
        """most: bytes of a message that is received; at least as many may be sent as may cross."""
        self.connection, self._most = connection, most

    def send(
        self, value: Any, refer: Refer | None = None, descriptor: int | None = None, seconds: float = SEND_SECONDS
    ) -> None:
        """Send one value, and a file descriptor behind it (the trusted process does, and never takes one).

        WorkerGone where the other end has closed, or does not take the message in time.
        """
        message = encode(value, refer, max(self._most, MOST_BYTES))
        try:
            self.connection.settimeout(seconds)
            self.connection.sendall(message)
            if descriptor is not None:
                socket.send_fds(self.connection, [b"+"], [descriptor])
            self.connection.settimeout(None)
        except TimeoutError:
            raise WorkerGone("the worker does not listen") from None
        except OSError as error:
            raise WorkerGone("the worker has ended") from error

    def receive(self, resolve: Resolve | None = None, seconds: float | None = None) -> Any:
        """The next value; TimeoutError after ``seconds``, WorkerGone where the other end has closed."""
        deadline = None if seconds is None else time.monotonic() + seconds
        text_size, blob_size = HEADER.unpack(self._exactly(HEADER.size, deadline))
        if text_size + blob_size > self._most:
            raise WireError(f"a message of {text_size + blob_size:,} bytes; {self._most:,} may cross")
        return decode(self._exactly(text_size, deadline), self._exactly(blob_size, deadline), resolve)

    def _exactly(self, size: int, deadline: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("no answer in time")
                self.connection.settimeout(left)
            try:
                part = self.connection.recv(min(size - len(parts), 2**20))
                self.connection.settimeout(None)
            except ConnectionResetError:
                part = b""
            if not part:
                raise WorkerGone("the worker has ended")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        self.connection.close()


def _tree(value: Any, refer: Refer | None, arrays: dict[str, Any], depth: int) -> list[Any]:
    """The JSON of a value: a list whose first element names the type."""
    if depth > MOST_DEPTH:
        raise WireError(f"nested deeper than {MOST_DEPTH}")

    def inner(part: Any) -> list[Any]:
        return _tree(part, refer, arrays, depth + 1)

    kind = type(value)
    if value is None:
        return ["none"]
    if kind is bool or kind is str:
        return [kind.__name__, value]
    if kind is int:
        return ["int", format(value, "x")]
    if kind is float:
        return ["float", value.hex()]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, [inner(part) for part in value]]
    if kind is dict:
        return ["dict", [[inner(key), inner(part)] for key, part in value.items()]]
    if kind is Reference:
        return ["reference", value.number, value.type_name, value.shown, value.callable]
    if _crosses_by_fields(kind):
        fields = {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return ["dataclass", f"{kind.__module__}.{kind.__qualname__}", fields]
    if (array := _as_array(value)) is not None:
        arrays[f"{array[0]}-{len(arrays)}"] = array[1]
        return [array[0], f"{array[0]}-{len(arrays) - 1}"]
    if kind.__module__ == "torch" and kind.__name__ == "dtype":
        return ["torch.dtype", str(value).removeprefix("torch.")]
    if refer is None:
        raise WireError(f"a {kind.__name__} is no plain data and cannot cross")
    return inner(refer(value))


def _value(tree: Any, resolve: Resolve | None, arrays: dict[str, Any], depth: int) -> Any:
    if depth > MOST_DEPTH:
        raise WireError(f"nested deeper than {MOST_DEPTH}")
    if type(tree) is not list or not tree or type(tree[0]) is not str:
        raise WireError("a part without a type")

    def inner(part: Any) -> Any:
        return _value(part, resolve, arrays, depth + 1)

    kind, *rest = tree
    if kind == "none":
        return None
    if kind in ("bool", "str"):
        return _exact(rest[0], bool if kind == "bool" else str)
    if kind == "int":
        if len(_exact(rest[0], str)) > MOST_DIGITS:
            raise WireError("a whole number with too many digits")
        return int(rest[0], 16)
    if kind == "float":
        return float.fromhex(_exact(rest[0], str))
    if kind == "bytes":
        return bytes.fromhex(_exact(rest[0], str))
    if kind in ("list", "tuple", "set", "frozenset"):
        build: Callable[[Any], Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return build([inner(part) for part in _exact(rest[0], list)])
    if kind == "dict":
        return {inner(key): inner(part) for key, part in _exact(rest[0], list)}
    if kind == "reference":
        number, type_name, shown, is_callable = rest
        reference = Reference(
            _exact(number, int), _exact(type_name, str), _exact(shown, str), _exact(is_callable, bool)
        )
        return resolve(reference) if resolve else reference
    if kind == "dataclass":
        known = find_class(_exact(rest[0], str))
        if known is None or not _crosses_by_fields(known):
            raise WireError("a dataclass that llmlab does not have")
        return known(**{_exact(name, str): inner(part) for name, part in _exact(rest[1], dict).items()})
    if kind in ("tensor", "ndarray"):
        return _from_array(kind, arrays[_exact(rest[0], str)])
    if kind == "torch.dtype":
        import torch

        return _exact(vars(torch).get(_exact(rest[0], str)), torch.dtype)  # getattr would import what torch has lazily
    raise WireError("a part of an unknown type")


def find_class(dotted: str) -> type | None:
    """The class of llmlab of that name, if its module is imported here already; None otherwise."""
    module_name, _, name = dotted.rpartition(".")
    if module_name.partition(".")[0] != "llmlab" or module_name not in sys.modules:
        return None
    found = vars(sys.modules[module_name]).get(name)
    return found if isinstance(found, type) and found.__module__ == module_name else None


def _crosses_by_fields(kind: type) -> bool:
    """Whether values of a class cross by name and fields: a dataclass that llmlab itself defines."""
    dotted = f"{kind.__module__}.{kind.__qualname__}"
    return dataclasses.is_dataclass(kind) and kind is not Reference and find_class(dotted) is kind


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise WireError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _as_array(value: Any) -> tuple[str, Any] | None:
    """("tensor" or "ndarray", the value) for what safetensors takes; a parameter crosses as its tensor."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in "biuf":
        return "ndarray", value
    if torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_sparse:
        return "tensor", value.detach().to("cpu").contiguous().clone()
    return None


def _from_array(kind: str, tensor: Any) -> Any:
    return tensor.numpy() if kind == "ndarray" else tensor


def _pack(arrays: dict[str, Any]) -> bytes:
    import safetensors.torch
    import torch

    tensors = {k: v if torch.is_tensor(v) else torch.from_numpy(v.copy()) for k, v in arrays.items()}
    return bytes(safetensors.torch.save(tensors))


def _unpack(blob: bytes) -> dict[str, Any]:
    import safetensors
    import safetensors.torch

    try:
        return dict(safetensors.torch.load(blob))
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise WireError("tensors that are not well formed") from error
