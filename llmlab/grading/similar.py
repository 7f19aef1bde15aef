"""Answers that resemble each other or the package: a list for a person to look at. It decides nothing.

Two answers are compared by fingerprints of their tokens, which a new name, another number, a comment or another layout
do not change, nor does a docstring. Which fingerprints are kept is decided by winnowing (Schleimer, Wilkerson and Aiken 2003): any run of
``K + WINDOW - 1`` tokens that two answers share leaves a common fingerprint in both.
"""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import re
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from llmlab.grading.notebooks import Cell, align
from llmlab.grading.split import GIVEN, STUDENT
from llmlab.grading.withhold import names_withheld_by

K = 6  # tokens in a fingerprint
WINDOW = 4  # one of so many fingerprints in a row is kept
FEWEST = 15  # fingerprints that an answer must have of its own to say anything
ALIKE = 0.7  # the share from which on a pair is listed

MOST_CHARACTERS = 200_000  # of an answer; what is behind them is not looked at

OWN_CELLS = "cells of their own"
SOLUTION = re.compile(r"^[ \t]*### BEGIN SOLUTION.*?### END SOLUTION[^\n]*\n?", re.MULTILINE | re.DOTALL)
_ROUGH = re.compile(r"#[^\n]*|'''.*?'''|\"\"\".*?\"\"\"|'[^'\n]*'|\"[^\"\n]*\"|\d[\w.]*|\w+|[^\w\s]", re.DOTALL)
_LAYOUT = {
    tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two answers to an exercise, and the share of the smaller one's fingerprints that the other has, too."""

    student: str
    other: str  # another student, or a name of the package
    exercise: str
    share: float


def fingerprint(source: str) -> frozenset[int]:
    """The fingerprints of a piece of Python; of anything else, too, by a rougher reading."""
    hashes = _hashes(source)
    windows = [hashes[i : i + WINDOW] for i in range(max(1, len(hashes) - WINDOW + 1))] if hashes else []
    return frozenset(min(window) for window in windows)


def similar_pairs(cells: Mapping[str, Mapping[str, str]], released: Iterable[str], alike: float = ALIKE) -> list[Pair]:
    """Pairs of students with like answers, the likest first.

    cells: student -> exercise -> source. What stands in a ``released`` source is left out, and so is an answer that
    then has too little in it.
    """
    prints = _own_prints(cells, released)
    pairs = []
    for (student, mine), (other, theirs) in itertools.combinations(sorted(prints.items()), 2):
        for exercise in mine.keys() & theirs.keys():
            pairs.append(Pair(student, other, exercise, _share(mine[exercise], theirs[exercise])))
    return _listed(pairs, alike)


def copies_of_package(
    cells: Mapping[str, Mapping[str, str]],
    sources: Mapping[str, str],
    released: Iterable[str],
    alike: float = ALIKE,
) -> list[Pair]:
    """Answers like a function of the package; sources: its dotted name -> its source."""
    released = list(released)
    prints = _own_prints(cells, released)
    package = _own_prints({"": sources}, released)[""]
    pairs = [
        Pair(student, name, exercise, _share(own, theirs))
        for student, mine in prints.items()
        for exercise, own in mine.items()
        for name, theirs in package.items()
    ]
    return _listed(pairs, alike)


def written_cells(instructor: list[Cell], submitted: list[Cell]) -> dict[str, str]:
    """The code that a student wrote, by exercise. Raises WrongStructure where nothing of the lab is found."""
    written: dict[str, str] = {}
    for cell in align(instructor, submitted).cells:
        if cell.kind == "code" and cell.role == STUDENT:
            name = cell.grade_id or OWN_CELLS
            written[name] = f"{written[name]}\n{cell.source}" if name in written else cell.source
    return written


def released_sources(instructor: list[Cell]) -> list[str]:
    """The code of a lab as students got it."""
    return [SOLUTION.sub("", cell.released()) for cell in instructor if cell.kind == "code"]


def withheld_names(instructor: list[Cell]) -> list[str]:
    """The dotted names that the lab's given cells withhold: the answers come from them."""
    given = [cell.source for cell in instructor if cell.kind == "code" and cell.role == GIVEN]
    return list(dict.fromkeys(name for source in given for name in names_withheld_by(source)))


# Ways around the guard of a withheld name, none of which an exercise needs.
AROUND = {"reload", "__closure__", "__globals__", "f_globals", "cell_contents", "getsource", "subprocess", "importlib"}


def reaches_for(cells: Mapping[str, Mapping[str, str]], withheld: Iterable[str]) -> list[Pair]:
    """Answers that name what the lab withholds, or a way around that; ``other`` is how they do."""
    shorts = {name.rpartition(".")[2] for name in withheld}
    pairs = []
    for student, answers in cells.items():
        trees = {exercise: _parsed(_as_python(source)) for exercise, source in answers.items()}
        package = {"llmlab"} | {name for tree in trees.values() for name in _package_names(tree)}
        for exercise, tree in trees.items():
            found = {name for node in ast.walk(tree) for name in _reached(node, shorts, package)}
            pairs += [Pair(student, name, exercise, 1.0) for name in found]
    return _listed(pairs, 1.0)


def _as_python(source: str) -> str:
    """A cell with its magics and commands as the calls that IPython makes of them."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        transformed: str = TransformerManager().transform_cell(source[:MOST_CHARACTERS])
    except SyntaxError:
        return ""
    return transformed


def _package_names(tree: ast.AST) -> Iterator[str]:
    """The names that modules of the package go by."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if f"{getattr(node, 'module', None) or alias.name}.".startswith("llmlab."):
                    yield alias.asname or alias.name.partition(".")[0]


def _reached(node: ast.AST, shorts: set[str], package: set[str]) -> list[str]:
    said = ast.unparse(node)[:80] if isinstance(node, ast.expr) else ""
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "llmlab":
        return [f"{node.module}.{a.name}" for a in node.names if a.name in shorts | {"*"}]
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = {a.name for a in node.names} | {str(getattr(node, "module", ""))}
        return sorted(AROUND & {name.partition(".")[0] for name in modules})
    if isinstance(node, ast.Attribute) and node.attr in AROUND:
        return [said]
    if isinstance(node, ast.Attribute) and node.attr in shorts and said.partition(".")[0] in package:
        return [said]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        words = set(re.findall(r"\w+", node.value))
        return [said] if "llmlab" in words and words & shorts else []
    if isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func) == "getattr":
        return [said] if getattr(node.args[1], "value", None) in shorts else []
    return []


def _own_prints(
    cells: Mapping[str, Mapping[str, str]], released: Iterable[str]
) -> dict[str, dict[str, frozenset[int]]]:
    """The fingerprints that are the writer's own, of what is long enough."""
    given = frozenset(itertools.chain.from_iterable(_hashes(source) for source in released))
    prints = {
        student: {exercise: fingerprint(source) - given for exercise, source in answers.items()}
        for student, answers in cells.items()
    }
    return {s: {e: own for e, own in answers.items() if len(own) >= FEWEST} for s, answers in prints.items()}


def _share(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / min(len(one), len(other))


def _listed(pairs: Iterable[Pair], alike: float) -> list[Pair]:
    found = [pair for pair in pairs if pair.share >= alike]
    return sorted(found, key=lambda pair: (-pair.share, pair.exercise, pair.student, pair.other))


def _hashes(source: str) -> list[int]:
    tokens = _tokens(source)
    return [zlib.crc32(" ".join(tokens[i : i + K]).encode()) for i in range(len(tokens) - K + 1)]


def _tokens(source: str) -> list[str]:
    """The tokens with every name and literal made alike; an attribute keeps its name, which a student cannot change."""
    try:
        raw = [(t.type, t.string) for t in tokenize.generate_tokens(io.StringIO(source[:MOST_CHARACTERS]).readline)]
    except (tokenize.TokenError, SyntaxError, ValueError):
        raw = [(_rough_type(text), text) for text in _ROUGH.findall(source[:MOST_CHARACTERS])]
    tokens: list[str] = []
    line = 0  # where the tokens of this statement begin
    for kind, text in raw:
        if kind == tokenize.NEWLINE:
            if tokens[line:] == ["string"]:
                del tokens[line:]  # a docstring
            line = len(tokens)
        if kind in _LAYOUT or not text.strip():
            continue
        if kind == tokenize.NAME:
            is_attribute = bool(tokens) and tokens[-1] == "."
            tokens.append(text if is_attribute or keyword.iskeyword(text) else "name")
        elif kind == tokenize.STRING or tokenize.tok_name[kind].startswith("FSTRING"):
            tokens.append("string")
        else:
            tokens.append("number" if kind == tokenize.NUMBER else text)
    return tokens


def _rough_type(text: str) -> int:
    if text.startswith("#"):
        return tokenize.COMMENT
    if text[0] in "'\"" and len(text) > 1:
        return tokenize.STRING
    if text[0].isdigit():
        return tokenize.NUMBER
    return tokenize.NAME if text.isidentifier() else tokenize.OP


def _parsed(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
