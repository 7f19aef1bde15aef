"""Imports in the package point one way, and the pure modules stay pure."""

import ast
import io
import sys
import tokenize

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
    "roofline": {"arguments", "config", "hardware", "memory"},
    "text": {"arguments", "cache"},
    "kv_cache": {"arguments", "config", "kernels", "model"},
    "batching": {"arguments", "config"},
    "kernels": set(),
    "model": {"checkpoint", "config", "kernels"},
    "parallel": {"arguments", "checkpoint", "config", "model"},
    "obs": set(),
    "calibration": {"arguments", "kernels", "model", "text"},
    "quantization": {"arguments", "cache", "calibration", "config", "hardware", "kernels", "model", "obs"},
    "engine": {"arguments", "batching", "kernels", "kv_cache", "model"},
    "accounting": set(),
    "checkpoint": {"cache", "config", "arguments", "hub"},
    "figures": set(),
    "grading": {"cache", "config"},
    "authoring": {"cache", "grading"},
    "__main__": {"cli"},
    "diagnosis": {"cache", "checkpoint", "grading"},
    "cli": {"arguments", "authoring", "checkpoint", "config", "diagnosis", "grading", "hardware", "memory"},
}
PURE = (
    "arguments", "config", "hardware", "memory", "roofline",
    *(name.removeprefix("llmlab.") for name in module_files() if name.startswith(("llmlab.batching", "llmlab.parallel.schedules"))),
    "kv_cache", "kv_cache.block_manager", "kv_cache.block_pool", "kv_cache.contiguous", "kv_cache.held",
)  # fmt: skip


GRAPH = import_graph()


def area(module):
    """The part of the package a module belongs to: "llmlab.grading.checks" is in "grading"."""
    return ([*module.split("."), ""])[1]


def test_every_module_has_a_row():
    assert {area(name) for name in module_files()} - {""} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(name for name in module_files() if area(name)))
def test_imports_follow_the_table(module):
    own = area(module)
    imported = {area(name) for name in GRAPH[module]} - {own, ""}
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


def code_lines(text):
    """Lines without blanks, comments and docstrings."""
    written = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        ):
            written |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            written -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(written)


def test_code_lines_are_counted():
    assert (
        code_lines(
            '"""Doc.\n\nMore."""\n\nx = 1  # why\n# a comment\n\ndef f(\n    a,\n):\n    """Doc."""\n    return """a\nb"""\n'
        )
        == 6
    )


def test_the_engine_is_small_enough_to_read():
    parts = [f for n, f in module_files().items() if area(n) in ("model", "kv_cache", "batching", "engine")]
    assert len(parts) > 20
    assert sum(code_lines(file.read_text(encoding="utf-8")) for file in parts) <= 2000


def test_labs_chapters_and_tests_are_not_imported(root):
    for file in module_files().values():
        text = file.read_text(encoding="utf-8")
        for name in ("labs", "chapters", "tests", "benchmarks"):
            assert f"import {name}" not in text
            assert f"from {name}" not in text, file
