"""Who imports whom, from the sources: a graph of files, and whether it has circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.helpers.support import ROOT


def sources(folder: str) -> dict[str, Path]:
    """The Python files of a folder by their dotted names, without the doors of packages."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py"
    }


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it: modules, and what it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """The files that each of these files imports, among these."""
    return {name: {other for other in imported(path) if other in files} - {name} for name, path in files.items()}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """The members of circles: what is left where those without arrows to others are taken away again and again."""
    left = dict(arrows)
    while bare := [name for name, others in left.items() if not others & set(left)]:
        for name in bare:
            del left[name]
    return sorted(left)
