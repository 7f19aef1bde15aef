"""Names of the package that answer an exercise raise while a submission runs; the rest of the package works."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any


class Withheld(RuntimeError):
    """A name that answers the exercise was called from outside the package."""


def withhold(names: Iterable[str]) -> None:
    """Make each dotted name, and every alias of it in the package, raise when code outside the package calls it.

    Of a class: what makes one of it, by its name or by a class method.
    """
    for dotted in names:
        module_name, name = dotted.rsplit(".", 1)
        original = getattr(importlib.import_module(module_name), name)
        guard = _guard(original, dotted)
        for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == "llmlab"]:
            for alias, value in list(vars(module).items()):
                if value is original:
                    setattr(module, alias, guard)


def _guard(original: Callable[..., Any], dotted: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def guard(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if caller.partition(".")[0] != "llmlab":
            raise Withheld(f"{dotted} answers this exercise; write it yourself")
        return original(*args, **kwargs)

    del guard.__wrapped__
    if isinstance(original, type):
        vars(guard).clear()  # a class has methods, which would answer too
        for name, value in vars(original).items():
            if isinstance(value, classmethod | staticmethod):
                setattr(guard, name, _guard(getattr(original, name), f"{dotted}.{name}"))
    return guard
