"""Argument checks, declared beside a signature so that the body of a formula stays the formula."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], None]
LARGEST = 1e100  # far above anything that is counted here, and a product of three such numbers is still a float


def number(*, above: float | None = None, at_least: float | None = None, at_most: float = LARGEST) -> Check:
    """A check that an argument is a finite real number within bounds; booleans are not numbers here."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
        try:
            size = float(value)
        except OverflowError:  # its digits would fill the screen
            raise ValueError(f"{name}: expected a number of at most {at_most} in size, got a larger one") from None
        if not math.isfinite(size):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
        if above is not None and not size > above:
            raise ValueError(f"{name}: expected a number above {above}, got {value!r}")
        if at_least is not None and not size >= at_least:
            raise ValueError(f"{name}: expected a number of at least {at_least}, got {value!r}")
        if not size <= at_most:
            raise ValueError(f"{name}: expected a number of at most {at_most}, got {size!r}")

    return check


def integer(*, at_least: int = 0) -> Check:
    """A check that an argument is a whole number of at least ``at_least`` and at most ``LARGEST``."""

    def check(name: str, value: Any) -> None:
        try:
            whole = value.__index__()
        except AttributeError:
            raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {value!r}") from None
        if abs(whole) > LARGEST:
            raise ValueError(f"{name}: expected a whole number of at most {LARGEST} in size, got a larger one")
        if isinstance(value, bool) or whole < at_least:
            raise ValueError(f"{name}: expected a whole number of at least {at_least}, got {value!r}")

    return check


def one_of(choices: Iterable[Any]) -> Check:
    """A check that an argument is one of ``choices``; the error names the nearest ones."""
    allowed = list(choices)

    def check(name: str, value: Any) -> None:
        if value in allowed and not isinstance(value, bool):
            return
        names = {str(choice).lower(): str(choice) for choice in allowed}
        near = []
        if isinstance(value, str) and all(isinstance(choice, str) for choice in allowed if choice is not None):
            near = [names[n] for n in difflib.get_close_matches(value.lower(), names, n=3, cutoff=0.4)]
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")

    return check


def instance_of(kind: type) -> Check:
    """A check that an argument is an instance of ``kind``."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__} {value!r}")

    return check


def checked(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run each check on the argument of its name before the function is called."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        unknown = set(checks) - set(signature.parameters)
        if unknown:
            raise TypeError(f"{function.__qualname__} has no parameters {sorted(unknown)}")

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, check in checks.items():
                check(name, bound.arguments[name])
            return function(*args, **kwargs)

        return wrapper

    return decorate
