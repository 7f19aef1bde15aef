"""Accelerators as data, and units that are never mixed."""

import pytest

from llmlab.hardware import DEVICES, GB, GiB, find_device, format_bytes


def test_a_card_of_80_gb_holds_80_gib():
    assert DEVICES["a100-80gb"].memory_bytes == 80 * GiB == 85_899_345_920


def test_units():
    assert format_bytes(24_203_531_136, "GB") == "24.20 GB"
    assert format_bytes(24_203_531_136, "GiB") == "22.54 GiB"
    assert GiB != GB


def test_rates_of_a_dtype_that_a_card_lacks():
    assert DEVICES["h100-80gb"].flops_of("float8") == 1979e12
    with pytest.raises(ValueError, match="dtype: expected one of"):
        DEVICES["v100-32gb"].flops_of("float8")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_device("h100"), "did you mean 'h100-80gb'"),
        (lambda: format_bytes(1, "gb"), "did you mean"),
        (lambda: format_bytes(float("inf")), "num_bytes: expected a finite number"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
