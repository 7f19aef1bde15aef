"""Small faults, made one at a time in a reference answer, that a grader must notice."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

_BINARY: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div, ast.Add), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div, ast.Mult), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.MatMult: (ast.Mult,),
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_FUNCTIONS = {"ceil": "floor", "floor": "ceil", "min": "max", "max": "min", "any": "all", "all": "any",
              "argmax": "argmin", "argmin": "argmax", "mean": "sum", "softmax": "log_softmax"}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A changed answer; ``name`` says what stands where, and stays the same while the line does."""

    name: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """Every single fault that the operators here make in ``source``; docstrings and annotations are left alone."""
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    original = ast.unparse(tree)
    for index, node in enumerate(list(_nodes(tree))):
        for number, change in enumerate(_changes(node)):
            copied = copy.deepcopy(tree)
            target = list(_nodes(copied))[index]
            before = ast.unparse(target)
            _apply(copied, target, list(_changes(target))[number])
            mutated = ast.unparse(ast.fix_missing_locations(copied))
            after = "" if change is None else ast.unparse(change)
            if mutated != original and mutated not in found:
                found[mutated] = Mutant(_name(before, after, found), mutated)
    return list(found.values())


def _name(before: str, after: str, found: dict[str, Mutant]) -> str:
    name = f"{before.splitlines()[0]} → {after.splitlines()[0] if after else '(removed)'}"
    same = sum(m.name == name or m.name.startswith(f"{name} #") for m in found.values())
    return f"{name} #{same + 1}" if same else name


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes in source order without docstrings, annotations and decorators."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "keywords_names"):
            continue
        children = value if isinstance(value, list) else [value]
        for position, child in enumerate(children):
            if not isinstance(child, ast.AST):
                continue
            docstring = (
                field == "body"
                and position == 0
                and isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
            )
            if not docstring and not isinstance(child, ast.JoinedStr | ast.Raise | ast.Assert):
                yield child
                yield from _nodes(child)


def _changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What a node may become; None removes a statement."""
    match node:
        case ast.BinOp():
            for operator in _BINARY.get(type(node.op), ()):
                yield ast.BinOp(node.left, operator(), node.right)
            yield node.left
            yield node.right
        case ast.AugAssign():
            for operator in _BINARY.get(type(node.op), ()):
                yield ast.AugAssign(node.target, operator(), node.value)
            yield None
        case ast.Compare(ops=[operator_node]):
            yield ast.Compare(node.left, [_COMPARISONS[type(operator_node)]()], node.comparators)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.If() | ast.While():
            yield _with_test(node, not isinstance(node, ast.While))
            yield _with_test(node, False)
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.Return(value=ast.AST()):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield None
        case ast.Break() | ast.Continue():
            yield ast.Pass()
        case ast.Call():
            yield from _changed_calls(node)
        case _:
            return


def _changed_calls(node: ast.Call) -> Iterator[ast.AST]:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in _FUNCTIONS:
        changed = copy.deepcopy(node)
        if isinstance(changed.func, ast.Attribute):
            changed.func.attr = _FUNCTIONS[name]
        elif isinstance(changed.func, ast.Name):
            changed.func.id = _FUNCTIONS[name]
        yield changed
    if len(node.args) == 2 and not any(isinstance(a, ast.Starred) for a in node.args):
        yield ast.Call(function, node.args[::-1], node.keywords)


def _with_test(node: ast.If | ast.While, value: bool) -> ast.AST:
    changed = copy.deepcopy(node)
    changed.test = ast.Constant(value)
    return changed


def _apply(tree: ast.AST, target: ast.AST, change: ast.AST | None) -> None:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is target and change is not None:
                setattr(parent, field, change)
                return
            if isinstance(value, list) and any(child is target for child in value):
                position = next(i for i, child in enumerate(value) if child is target)
                value[position : position + 1] = (
                    [change] if change is not None else ([ast.Pass()] if len(value) == 1 else [])
                )
                return
    raise AssertionError("the node stands in the tree that it was taken from")
