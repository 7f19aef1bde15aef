"""Whether the hub can be asked: known at once, by the way that its library would take."""

import contextlib
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from llmlab import hub
from llmlab.hub import hub_trouble


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def listening():
    """The port of a server on this machine that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed():
    """A port that nobody listens on: it is bound, so nobody else takes it."""
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_hub_that_answers_is_no_trouble(monkeypatch, listening):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    assert hub_trouble() is None


def test_the_offline_switch_is_honoured_without_a_try(monkeypatch, listening):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_connect", lambda *a: pytest.fail("tried to connect"))
    assert hub_trouble() == "$HF_HUB_OFFLINE is set"


def test_a_refusal_is_named(monkeypatch, closed):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    assert hub_trouble() == "the hub 127.0.0.1 is out of reach: Connection refused"


def test_the_proxy_is_asked_in_the_place_of_the_hub(monkeypatch, listening, closed):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{listening}")
    assert hub_trouble() is None
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    assert hub_trouble().startswith("the hub hub.invalid is out of reach: ")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv("ALL_PROXY", f"http://user:word@127.0.0.1:{closed}")
    assert hub_trouble() == "the proxy 127.0.0.1 is out of reach: Connection refused"


@pytest.mark.parametrize("endpoint", ["hub.example.org", "ftp://hub.example.org", "http://host:99999", "http://"])
def test_what_is_no_address_is_said(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert hub_trouble() == f"$HF_ENDPOINT {endpoint!r} is not the address of a server"


def test_the_password_of_a_proxy_is_not_shown(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("ALL_PROXY", "other://user:word@proxy.example.org")
    assert hub_trouble() == "the environment's proxy is not the address of a server"


def test_a_name_that_no_server_can_have_is_said(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub..example.org")
    assert hub_trouble().startswith("the hub hub..example.org is out of reach: ")


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a: answered.wait(20) and [])
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example.org")
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    start = time.monotonic()
    trouble = hub_trouble()
    assert time.monotonic() - start < 2
    assert trouble == "the hub hub.example.org did not answer within 0.2 s ($HF_HUB_ETAG_TIMEOUT gives it longer)"
    answered.set()


def test_a_slow_network_gets_the_time_that_its_user_set(monkeypatch):
    asked = []
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org")
    monkeypatch.setattr(hub, "_connect", lambda *a: asked.append(a))
    assert hub_trouble() is None
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "20")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 20)
    assert hub_trouble() is None
    assert asked == [("hub.example.org", 443, 3.0), ("hub.example.org", 443, 20)]


def test_one_address_that_answers_is_enough(monkeypatch, listening):
    """Where IPv6 leads nowhere, the addresses before the good one do not use up the time."""
    places = [("127.0.0.2", 0), ("127.0.0.1", listening)]
    connect, stuck = socket.create_connection, threading.Event()

    def only_the_second(place, timeout):
        if place == places[0]:
            stuck.wait(20)
            raise TimeoutError
        return connect(place, timeout)

    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", p) for p in places]
    )
    monkeypatch.setattr(socket, "create_connection", only_the_second)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example.org")
    assert hub_trouble() is None
    stuck.set()
