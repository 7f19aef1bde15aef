"""Taking a lab's reference answer from the one place that holds it: the package's own source."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib.util
import symtable
import textwrap
from collections.abc import Iterable
from pathlib import Path

Definition = ast.FunctionDef | ast.ClassDef


class LiftError(ValueError):
    """A lab names an answer that is not there, has another signature, or leans on names that the lab does not give."""


def lift_body(dotted: str, stub: str, given: Iterable[str], indent: str) -> str:
    """The source of the body of ``dotted``, without its docstring, indented by ``indent``.

    dotted: "llmlab.memory.serving_bytes" or "llmlab.kv_cache.BlockManager.allocate".
    stub: the lab's own definition, whose signature must be the same (annotations may be left out).
    given: the names that the lab's cells define before the student starts.
    """
    source, node = _find(dotted)
    lab = next((n for n in ast.parse(textwrap.dedent(stub)).body if isinstance(n, Definition)), None)
    if lab is None or lab.name != node.name:
        raise LiftError(f"{dotted}: the lab's cell does not define {node.name!r}")
    if isinstance(node, ast.FunctionDef) and isinstance(lab, ast.FunctionDef) and _signature(node) != _signature(lab):
        raise LiftError(f"{dotted}{_signature(node)}: the lab has the signature {_signature(lab)}")
    lines = source.splitlines()
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = (first.end_lineno or 0) if has_docstring else first.lineno - 1
    body = textwrap.dedent("\n".join(lines[start : node.end_lineno])).strip("\n")
    missing = free_names(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))) - set(given)
    if missing:
        raise LiftError(
            f"{dotted}: its body uses {', '.join(sorted(missing))}, which the lab's given cells do not define"
        )
    return textwrap.indent(body, indent)


def free_names(source: str) -> set[str]:
    """The names that a definition takes from outside itself, builtins and annotations apart."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns, node.decorator_list = None, []
            for argument in _arguments(node.args):
                argument.annotation = None
    own = {n.name for n in tree.body if isinstance(n, Definition)}
    found: set[str] = set()
    tables = [symtable.symtable(ast.unparse(tree), "<lifted>", "exec")]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        if table.get_type() != "module":
            found |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return found - own - set(dir(builtins))


def defined_names(source: str) -> set[str]:
    """The names that running a cell defines at its top level."""
    table = symtable.symtable(source, "<cell>", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}


def _find(dotted: str) -> tuple[str, Definition]:
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if spec is None or spec.origin is None:
            continue
        source = Path(spec.origin).read_text(encoding="utf-8")
        node: ast.Module | Definition = ast.parse(source)
        for name in parts[cut:]:
            inner = next((n for n in node.body if isinstance(n, Definition) and n.name == name), None)
            if inner is None:
                raise LiftError(f"{dotted}: {module} defines no {name!r}")
            node = inner
        if isinstance(node, Definition):
            return source, node
    raise LiftError(f"{dotted}: no such module")


def _signature(node: ast.FunctionDef) -> str:
    arguments = copy.deepcopy(node.args)
    for argument in _arguments(arguments):
        argument.annotation = None
    return f"({ast.unparse(arguments)})"


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    starred = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred]
