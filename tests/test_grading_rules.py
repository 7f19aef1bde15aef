"""What holds of every module of the grader: its length, and that what catches everything says why."""

import ast

import pytest

from llmlab.authoring.imports import module_files

MODULES = {name: file for name, file in module_files().items() if name.startswith("llmlab.grading.")}
BROAD = {"Exception", "BaseException"}
MOST_LINES = 300


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short_enough_to_be_read(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def broad(tree):
    """The lines at which something catches whatever is raised."""
    for node in ast.walk(tree):
        caught = []
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "suppress":
            caught = node.args
        if any(kind is None or getattr(kind, "id", "") in BROAD for kind in caught):
            yield node.lineno


def test_what_catches_everything_is_found():
    source = "try: f()\nexcept: pass\ntry: f()\nexcept (OSError, Exception): pass\nwith c.suppress(BaseException): f()\ntry: f()\nexcept OSError: pass"
    assert list(broad(ast.parse(source))) == [2, 4, 5]


@pytest.mark.parametrize("name", MODULES)
def test_what_catches_everything_says_why(name):
    """In a comment on the line, behind the mark for ruff where it takes one, or on the line above."""
    source = MODULES[name].read_text(encoding="utf-8")
    lines = source.splitlines()
    for number in broad(ast.parse(source)):
        why = lines[number - 1].partition("#")[2].removeprefix(" noqa: BLE001").strip()
        assert why or lines[number - 2].strip().startswith("#"), f"{name}:{number}"
