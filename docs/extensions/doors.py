"""The API reference, read from the code so that it cannot miss a name.

Two lines of a Markdown page are replaced: `<!-- door pdeopt -->` by tables of the names of a door, grouped as in its
`__init__.pyi`, and `<!-- room pdeopt.steps -->` by all modules of that room.
"""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def door(package: str) -> str:
    """A table of names for each group of imports of the stub; a group begins with a comment."""
    lines = (ROOT / package.replace(".", "/") / "__init__.pyi").read_text().splitlines()
    tables = []
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ImportFrom):
            if (title := re.match(r"# (.*)", lines[node.lineno - 2])) and node.lineno > 1:
                tables += ["", f"### {title[1].rstrip('.')}", "", "| | |", "|---|---|"]
            tables += [row(node.module, alias.name) for alias in node.names]
    return "\n".join(tables)


def row(module: str, name: str) -> str:
    thing = getattr(import_module(module), name)
    sentence = re.split(r"(?<=\.)\s|\n\n", inspect.getdoc(thing) or "")[0].replace("\n", " ").replace("|", r"\|")
    return f"| {{py:obj}}`{name} <{module}.{name}>` | {sentence} |"


def room(package: str) -> str:
    """Every module of a room, in the order of the room's stub, those without public names last."""
    folder = ROOT / package.replace(".", "/")
    stub = (folder / "__init__.pyi").read_text() if (folder / "__init__.pyi").exists() else ""
    names = sorted(f.stem for f in folder.glob("*.py") if f.stem != "__init__")
    text = "```{eval-rst}\n.. automodule:: PACKAGE.NAME\n```\n".replace("PACKAGE", package)
    place = {name: stub.find(f"{package}.{name} ") % (len(stub) + 1) for name in names}
    return "\n".join(f"## {name}\n\n" + text.replace("NAME", name) for name in sorted(names, key=place.__getitem__))


def replace(app, docname: str, source: list[str]) -> None:
    makers = {"door": door, "room": room}
    source[0] = re.sub(r"^<!-- (door|room) (\S+) -->$", lambda m: makers[m[1]](m[2]), source[0], flags=re.MULTILINE)


def setup(app):
    app.connect("source-read", replace)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
