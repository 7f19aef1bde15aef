"""Which module of the package imports which, read from the sources without running them."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def module_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name to file, for every module of the package."""
    names = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imported_modules(source: str, known: Iterable[str]) -> set[str]:
    """The modules of ``known`` that a source imports anywhere in it, inside functions too."""
    known = set(known)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


def import_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For each module of the package, the modules of the package that it imports."""
    files = module_files(package)
    return {name: imported_modules(file.read_text(encoding="utf-8"), files) for name, file in files.items()}


def sources_behind(sources: Iterable[str]) -> str:
    """A hash of ``sources`` and of every module of the package that they import, directly or not."""
    files, graph = module_files(), import_graph()
    digest = hashlib.sha256()
    reached: set[str] = set()
    for source in sources:
        digest.update(source.encode())
        waiting = imported_modules(source, files)
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting |= graph[name]
    for name in sorted(reached):
        digest.update(files[name].read_bytes())
    return digest.hexdigest()
