"""Names of the package that answer an exercise raise while a submission runs; the rest of the package works."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Withheld(RuntimeError):
    """A name that answers the exercise was called from outside the package."""


def withhold(names: Iterable[str]) -> None:
    """Make each dotted name, and every alias of it in the package, raise when code outside the package calls it.

    Of a class: what makes one of it, by its name or by a class method. A name that is withheld already stays so.
    """
    for dotted in names:
        module_name, name = dotted.rsplit(".", 1)
        original = getattr(importlib.import_module(module_name), name)
        if original in _GUARDS:
            continue
        guard = _guard(original, dotted)
        _put(guard, original)
        for replaced in _OPEN[-1:]:
            replaced.append((original, guard))


@contextlib.contextmanager
def restored_behind() -> Iterator[None]:
    """What is withheld inside the block is there again behind it, in modules too that the block imported.

    For a process that tries a grader and has other work to do. What was withheld before the block stays so.
    """
    guards = set(_GUARDS)
    _OPEN.append([])
    try:
        yield
    finally:
        for original, guard in _OPEN.pop():
            _put(original, guard)
        _GUARDS.intersection_update(guards)


def names_withheld_by(source: str) -> list[str]:
    """The dotted names that a given cell withholds. Raises ValueError where they are not written out as a list of texts."""
    names: list[str] = []
    try:
        tree: ast.AST = ast.parse(source)
    except (SyntaxError, ValueError):
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "withhold":
            for argument in node.args:
                try:
                    found = ast.literal_eval(argument)
                except ValueError:
                    found = None
                if type(found) is not list or not all(type(name) is str and "." in name for name in found):
                    raise ValueError(f"withhold: expected a list of dotted names, got {ast.unparse(argument)}")
                names += found
    return list(dict.fromkeys(names))


_GUARDS: set[Callable[..., Any]] = set()
# Of each open block of ``restored_behind``, what is to be put back. Where none is open, as in a worker, nothing is noted down.
_OPEN: list[list[tuple[Callable[..., Any], Callable[..., Any]]]] = []


def _put(new: Callable[..., Any], old: Callable[..., Any]) -> None:
    """``new`` under every name that a module of the package has for ``old``."""
    for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == "llmlab"]:
        for alias, value in list(vars(module).items()):
            if value is old:
                setattr(module, alias, new)


def _guard(original: Callable[..., Any], dotted: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def guard(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals
        if not _is_of_the_package(caller):
            raise Withheld(f"{dotted} answers this exercise; write it yourself")
        return original(*args, **kwargs)

    del guard.__wrapped__
    _GUARDS.add(guard)
    if isinstance(original, type):
        vars(guard).clear()  # a class has methods, which would answer too
        for name, value in vars(original).items():
            if isinstance(value, classmethod | staticmethod):
                setattr(guard, name, _guard(getattr(original, name), f"{dotted}.{name}"))
    return guard


def _is_of_the_package(names: dict[str, Any]) -> bool:
    """Whether these are the globals of one of its modules; the grader's do not count: it calls what a student named."""
    name = names.get("__name__")
    if type(name) is not str or name.partition(".")[0] != "llmlab" or name.startswith("llmlab.grading"):
        return False
    return names is getattr(sys.modules.get(name), "__dict__", None)
