"""Doors: packages that re-export their public names, loaded when first asked for.

The names of a package stand in its `__init__.pyi`, grouped by imports: type checkers and editors read the stub, and
`attach` reads the same file, so that there is one list. (As `lazy_loader` of scientific Python has it.)

So `petsc4py.init(sys.argv)` may come after `import pdeopt`; `heed_late_init` lets it come after PETSc's start, too.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import petsc4py


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package from the stub beside its `__init__.py`.

    Args:
        package, file: `__name__` and `__file__` of the package.

    Example:
        `__getattr__, __dir__, __all__ = attach(__name__, __file__)`
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text())
    homes = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names, folder = sorted(homes), Path(file).parent

    def get(name: str) -> Any:
        if (folder / name / "__init__.py").exists():  # a room: `pdeopt.steps` without an import of its own
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")
        module, original = homes[name]
        return getattr(import_module(str(module)), original)

    return get, lambda: names, names


def heed_late_init() -> None:
    """Let `petsc4py.init(args)` add to PETSc's options where PETSc runs already, started without arguments.

    By itself it does nothing then. Done when pdeopt is imported; PETSc is not started by it.
    """
    start = petsc4py.init

    @functools.wraps(start)
    def init(args: Any = None, *rest: Any, **others: Any) -> None:
        is_late = "petsc4py.PETSc" in sys.modules
        start(args, *rest, **others)
        if is_late:
            _insert(petsc4py.lib.getInitArgs(args)[1:])

    petsc4py.init = init


def is_name(word: str) -> bool:
    """Whether a word of a command line is the name of an option, and not a value, maybe a negative number."""
    return re.match("--?[^0-9.-]", word) is not None and word.lstrip("-").lower() not in ("inf", "infinity", "nan")


def _insert(words: list[str]) -> None:
    from petsc4py import PETSc

    database = PETSc.Options()
    for word, following in zip(words, [*words[1:], "-"]):
        if is_name(word) and not database.hasName(word.lstrip("-")):
            database.setValue(word.lstrip("-"), "" if is_name(following) or following == "-" else following)
