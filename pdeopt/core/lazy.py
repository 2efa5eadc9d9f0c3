"""Doors: packages that re-export their public names, loaded when first asked for.

The names of a package stand in its `__init__.pyi`, grouped by imports: type checkers and editors read the stub, and
`attach` reads the same file, so that there is one list. (As `lazy_loader` of scientific Python has it.)
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


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
