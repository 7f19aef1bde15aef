"""Whether the Hugging Face hub can be asked, known within seconds.

Without a network the hub's own library tries for half a minute, and prints a line for each try.
"""

from __future__ import annotations

import concurrent.futures
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

SECONDS = 3.0
_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}


def hub_trouble() -> str | None:
    """Why the hub cannot be asked, in a few words; None where a connection to it opens.

    The connection goes where the library's would: to ``$HF_ENDPOINT``, or to the proxy that the environment names for
    it; nothing is sent. It must open within ``SECONDS``, or what ``$HF_HUB_ETAG_TIMEOUT`` gives a slower network.
    ``$HF_HUB_OFFLINE`` is a trouble of its own.
    """
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "$HF_HUB_OFFLINE is set"
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else SECONDS
    address = _first_stop(constants.ENDPOINT)
    kind = "hub" if address == constants.ENDPOINT else "proxy"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or _PORTS[parts.scheme]
    except (ValueError, KeyError):
        host = None
    if not host:
        what = f"$HF_ENDPOINT {address!r}" if kind == "hub" else "the environment's proxy"  # which may hold a password
        return f"{what} is not the address of a server"
    try:
        _connect(host, port, seconds)
    except TimeoutError:
        return f"the {kind} {host} did not answer within {seconds:g} s ($HF_HUB_ETAG_TIMEOUT gives it longer)"
    except (OSError, UnicodeError) as error:
        return f"the {kind} {host} is out of reach: {getattr(error, 'strerror', None) or error}"
    return None


def _first_stop(endpoint: str) -> str:
    """The endpoint's address, or that of the proxy on the way to it."""
    parts = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return endpoint
    return proxy if "://" in proxy else f"http://{proxy}"


def _connect(host: str, port: int, seconds: float) -> None:
    """Open a connection to any of the host's addresses, all tried at once, and close it. Raises OSError."""
    end = time.monotonic() + seconds
    found = _begin(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM).result(seconds)
    attempts = [_begin(_open, place[:2], seconds) for *_, place in found]
    error: BaseException | None = None
    for attempt in concurrent.futures.as_completed(attempts, max(0.0, end - time.monotonic())):
        error = attempt.exception()
        if error is None:
            return
    raise error or OSError("no address")


def _open(place: tuple[str, int], seconds: float) -> None:
    socket.create_connection(place, seconds).close()


def _begin(function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
    """The outcome of a call in a thread of its own, which keeps nobody waiting at exit as an executor's would."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except (OSError, UnicodeError) as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
