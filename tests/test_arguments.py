"""Argument checks: what passes, what is refused, and what the message says."""

import pytest

from llmlab.arguments import checked, integer, number, one_of


@checked(size=number(above=0), count=integer(at_least=1), kind=one_of(("alpha", "beta")))
def made(size, count=1, kind="alpha"):
    """Doc."""
    return size, count, kind


def test_right_arguments_pass_unchanged():
    assert made(2.5, kind="beta") == (2.5, 1, "beta")
    assert made.__doc__ == "Doc."
    assert made.__name__ == "made"


def test_numpy_numbers_are_numbers():
    import numpy

    assert made(numpy.float64(1.5), numpy.int64(3))[1] == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "size: expected a number above 0, got 0"),
        (("1",), TypeError, "size: expected a number, got str '1'"),
        ((True,), TypeError, "size: expected a number, got bool True"),
        ((float("nan"),), ValueError, "size: expected a finite number, got nan"),
        ((10**400,), ValueError, "size: expected a number of at most 1e+100 in size, got a larger one"),
        ((-(10**5000),), ValueError, "size: expected a number of at most 1e+100 in size, got a larger one"),
        ((10**200,), ValueError, "size: expected a number of at most 1e+100, got 1e+200"),
        ((1, 10**5000), ValueError, "count: expected a whole number of at most 1e+100 in size, got a larger one"),
        ((1, 0), ValueError, "count: expected a whole number of at least 1, got 0"),
        ((1, 1.0), TypeError, "count: expected a whole number, got float 1.0"),
        ((1, 1, "ALPHA"), ValueError, "kind: expected one of 'alpha', 'beta', got 'ALPHA'; did you mean 'alpha'?"),
        ((1, 1, None), ValueError, "kind: expected one of 'alpha', 'beta', got None"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        made(*arguments)
    assert str(caught.value) == message


def test_a_check_of_a_parameter_that_is_not_there_is_refused():
    with pytest.raises(TypeError, match=r"no parameters \['sise'\]"):
        checked(sise=number())(lambda size: size)
