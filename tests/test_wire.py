"""What crosses between a worker and the trusted process: plain data exactly, everything else by reference or not at all."""

import json
import math
import socket

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.config import MODEL_CONFIGS
from llmlab.grading.wire import (
    HEADER,
    MOST_BYTES,
    MOST_DEPTH,
    Channel,
    Reference,
    WireError,
    WorkerGone,
    decode,
    encode,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def across(value, refer=None, resolve=None):
    message = encode(value, refer)
    text_size, _ = HEADER.unpack(message[: HEADER.size])
    body = message[HEADER.size :]
    return decode(body[:text_size], body[text_size:], resolve)


def same(a, b):
    """Equal in value and in type, all the way down; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is dict:
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b or (type(a) is float and math.isnan(a) and math.isnan(b))


@given(PLAIN)
def test_plain_data_crosses_exactly(value):
    assert same(across(value), value)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn]
)
def test_tensors_cross_with_shape_and_dtype(dtype):
    tensor = (torch.arange(-6, 6).reshape(3, 4) % 5).to(dtype)
    arrived = across({"a": [tensor, tensor.t()]})["a"]
    for got, sent in zip(arrived, (tensor, tensor.t()), strict=True):
        assert (type(got), got.dtype, got.shape) == (torch.Tensor, dtype, sent.shape)
        assert torch.equal(got.view(torch.uint8).reshape(-1), sent.contiguous().view(torch.uint8).reshape(-1))


def test_arrays_parameters_dtypes_and_llmlabs_own_dataclasses_cross():
    array = numpy.arange(6.0).reshape(2, 3)[:, ::-1]
    assert type(across(array)) is numpy.ndarray
    assert (across(array) == array).all()
    assert torch.equal(across(torch.nn.Parameter(torch.ones(2))), torch.ones(2))
    assert across(torch.bfloat16) is torch.bfloat16
    assert across(MODEL_CONFIGS["phi-2"]) == MODEL_CONFIGS["phi-2"]


class AnInt(int):
    def __eq__(self, other):
        return True

    __hash__ = None


@pytest.mark.parametrize(
    "value", [AnInt(3), numpy.float64(3.0), object(), len, {1: object()}, torch.nn.Linear(1, 1), 1j]
)
def test_what_is_not_plain_is_refused_or_stays_where_it_is(value):
    with pytest.raises(WireError, match="cannot cross"):
        encode(value)
    kept = []

    def refer(thing):
        kept.append(thing)
        return Reference(len(kept) - 1, type(thing).__name__, "shown", callable(thing))

    arrived = across([value], refer)[0]
    assert type(arrived) is Reference or type(arrived) is dict
    assert len(kept) == 1


@pytest.mark.parametrize(
    "tree",
    [
        [], ["int"], ["int", 5], ["int", "zz"], ["int", "f" * 5000], ["float", "x"], ["bool", 1], ["str", 1], ["bytes", "0"],
        ["list", "ab"], ["dict", [[["list", []], ["none"]]]], ["dict", [1]], ["set", [["list", []]]], {"a": 1}, "int", None,
        ["dataclass", "os.system", {}], ["dataclass", "llmlab.config.find_config", {}], ["dataclass", "llmlab.config.ModelConfig", {}],
        ["dataclass", "llmlab.grading.wire.Reference", {}], ["dataclass", "llmlab.config.ModelConfig", {"name": ["none"]}],
        ["tensor", "tensor-0"], ["torch.dtype", "load"], ["torch.dtype", "__dict__"], ["reference", 1.5, "a", "b", True],
        ["reference", 1, "a", "b"], ["unknown", 1],
    ],
    ids=str,
)  # fmt: skip
def test_a_message_that_is_not_well_formed_is_refused(tree):
    with pytest.raises(WireError):
        decode(json.dumps(tree).encode(), b"")


@pytest.mark.parametrize("blob", [b"x", b"\x00" * 8, (2**40).to_bytes(8, "little") + b"{}"])
def test_tensors_that_are_not_well_formed_are_refused(blob):
    with pytest.raises(WireError):
        decode(b'["tensor","tensor-0"]', blob)


def test_depth_digits_and_bytes_are_bounded():
    deep = []
    for _ in range(MOST_DEPTH + 1):
        deep = [deep]
    with pytest.raises(WireError, match="nested deeper"):
        encode(deep)
    with pytest.raises(WireError):
        decode(b"[" * 100_000, b"")
    with pytest.raises(WireError, match="may cross"):
        encode("x" * (MOST_BYTES + 1))


def test_a_channel_has_deadlines_and_bounds_and_sees_the_end():
    near, far = socket.socketpair()
    channel = Channel(near)
    with pytest.raises(TimeoutError):
        channel.receive(seconds=0.05)
    far.sendall(HEADER.pack(MOST_BYTES, 1))
    with pytest.raises(WireError, match="may cross"):
        channel.receive(seconds=1)
    far.close()
    with pytest.raises(WorkerGone):
        channel.receive(seconds=1)
    with pytest.raises(WorkerGone):
        channel.send("x" * 10_000_000)
    channel.close()
