"""Imports in the package point one way, and the pure modules stay pure."""

import ast
import sys

import pytest

from llmlab.authoring.imports import import_graph, module_files

# What stands on the left may import what stands on the right, and nothing else of the package.
MAY_IMPORT = {
    "arguments": set(),
    "cache": set(),
    "config": {"arguments"},
    "hardware": {"arguments"},
    "hub": set(),
    "memory": {"arguments", "config", "hardware"},
    "text": {"arguments", "cache"},
    "accounting": set(),
    "checkpoint": {"cache", "config", "arguments", "hub"},
    "figures": set(),
    "grading": {"cache", "config"},
    "authoring": {"cache", "grading"},
    "__main__": {"cli"},
    "diagnosis": {"cache", "checkpoint", "grading"},
    "cli": {"arguments", "authoring", "checkpoint", "config", "diagnosis", "grading", "hardware", "memory"},
}
PURE = ("arguments", "config", "hardware", "memory")


def area(module):
    """The part of the package a module belongs to: "llmlab.grading.checks" is in "grading"."""
    return ([*module.split("."), ""])[1]


def test_every_module_has_a_row():
    assert {area(name) for name in module_files()} - {""} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(name for name in module_files() if area(name)))
def test_imports_follow_the_table(module):
    own = area(module)
    imported = {area(name) for name in import_graph()[module]} - {own, ""}
    assert imported <= MAY_IMPORT[own], f"{module} imports {sorted(imported - MAY_IMPORT[own])}"


def test_the_table_has_no_circle():
    def reach(name, path=()):
        assert name not in path, f"{' -> '.join(path)} -> {name}"
        for other in MAY_IMPORT[name]:
            reach(other, (*path, name))

    for name in MAY_IMPORT:
        reach(name)


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_the_standard_library_only(name):
    tree = ast.parse(module_files()[f"llmlab.{name}"].read_text(encoding="utf-8"))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.partition(".")[0])
    assert roots - {"llmlab"} <= set(sys.stdlib_module_names)


def test_a_forbidden_arrow_is_seen(tmp_path):
    """The check can fail: a package with an arrow from memory to grading, hidden inside a function."""
    package = tmp_path / "llmlab"
    (package / "grading").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "grading" / "__init__.py").write_text("")
    (package / "memory.py").write_text("def f():\n    from llmlab.grading import checks\n")
    (package / "grading" / "checks.py").write_text("")
    assert import_graph(package)["llmlab.memory"] == {"llmlab.grading", "llmlab.grading.checks"}


def test_no_grab_bags_and_no_long_files():
    files = module_files().values()
    assert not {"utils.py", "common.py", "helpers.py", "misc.py"} & {file.name for file in files}
    long = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    # memory.py is half docstrings: the equations of one chapter in one place.
    assert {
        name: lines for name, lines in long.items() if lines > 300 and name not in ("memory.py", "checkpoint.py")
    } == {}


def test_labs_chapters_and_tests_are_not_imported(root):
    for file in module_files().values():
        text = file.read_text(encoding="utf-8")
        for name in ("labs", "chapters", "tests", "benchmarks"):
            assert f"import {name}" not in text
            assert f"from {name}" not in text, file
