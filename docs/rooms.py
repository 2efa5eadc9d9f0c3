"""The picture of the rooms: `python docs/rooms.py` draws docs/images/rooms.svg from the imports.

A box is a room with its modules; it stands one floor above the highest room that it imports. An arrow points to a room
that is imported; what other arrows imply is left out.
"""

from __future__ import annotations

import ast
from functools import cache
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).with_name("images") / "rooms.svg"

#: The rooms of a package, lower ones first, each with its columns in the picture. A new room needs an entry here.
ROOMS = {
    "pdeopt": {
        "core": (0, 1),
        "space/layouts": (0,),
        "steps/matrices": (0,),
        "steps/exchange": (1,),
        "steps": (0,),
        "functions": (1,),
        "squares": (1,),
        "control": (0,),
        "space": (1,),
        "kkt": (0,),
        "precond": (0,),
        "lowrank": (1,),
        "optimize/parts": (1,),
        "optimize/fullspace": (0,),
        "optimize/descent": (1,),
        "optimize/squares": (1,),
        "optimize/splitting": (1,),
        "optimize/solutions": (0,),
        "optimize": (0, 1),
    },
    "nn_adapters": {
        "data": (0,),
        "layers/parts": (1,),
        "layers": (1,),
        "parallel": (3,),
        "pinn": (2,),
        "curvature": (3,),
        "losses": (2,),
        "control": (3,),
        "training": (0,),
        "splitting": (1,),
        "compression": (2,),
    },
}

# --------------------------------------------------------------------------- what the code says


@cache
def modules(room: str) -> list[str]:
    """Names of the modules of a room, given as a path: `modules("pdeopt/steps")`."""
    return sorted(f.stem for f in (ROOT / room).glob("*.py") if f.stem != "__init__")


@cache
def imports(room: str) -> set[str]:
    """The rooms, as paths, that the modules of a room import."""
    found = set()
    for module in modules(room):
        for node in ast.walk(ast.parse((ROOT / room / f"{module}.py").read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {room_of(name) for name in names if name.startswith(tuple(ROOMS))}
    return found - {room}


def room_of(module: str) -> str:
    """The folder of a module, or of a door."""
    path = module.replace(".", "/")
    return path if (ROOT / path).is_dir() else path.rpartition("/")[0]


def arrows(package: str) -> dict[str, set[str]]:
    """Room -> the rooms of the same package that it imports, without those that others of them import.

    Raises:
        ValueError: A room imports one that stands after it in the table.
    """
    rooms = ROOMS[package]
    direct: dict[str, set[str]] = {}
    below: dict[str, set[str]] = {}
    for room in rooms:
        inside = {other for other in rooms if other.startswith(f"{room}/")}  # its door has their names
        direct[room] = inside | {other for other in rooms if f"{package}/{other}" in imports(f"{package}/{room}")}
        if upward := direct[room] - direct.keys():
            raise ValueError(f"{package}/{room} imports {', '.join(sorted(upward))}, which stands above it")
        below[room] = direct[room].union(*(below[other] for other in direct[room]))
    return {room: {r for r in uses if not any(r in below[other] for other in uses)} for room, uses in direct.items()}


def floors(uses: dict[str, set[str]]) -> dict[str, int]:
    """Room -> its floor, 0 for one that imports no other."""

    @cache
    def floor(room: str) -> int:
        return max((floor(other) + 1 for other in uses[room]), default=0)

    return {room: floor(room) for room in uses}


# --------------------------------------------------------------------------- how it is drawn

WIDTH = 760  # of the picture
TITLE, LINE, STOREY = 30, 14, 22  # heights: of the head of a box, of a line of names, between the floors
MARGIN, GUTTER, LANE = 16, 44, 9  # around the boxes; between columns; between arrows in a gutter
DOOR = 64  # height of the part of a frame that has the door
LETTER = 5.6  # mean width of a letter of the modules' names

STYLE = """
text { font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; font-size: 11px; fill: #33435a; }
.frame { fill: none; stroke: #8b929c; }
.box { fill: #eaf0f8; stroke: #7d93b2; }
.title { fill: #17263c; font-size: 14px; font-weight: 600; }
.door { fill: #3b5b8c; }
.command { fill: #fff; font: 600 13px ui-monospace, Menlo, Consolas, monospace; }
.label { fill: #7c838d; font-size: 12px; }
.arrow { fill: none; stroke: #8b929c; stroke-width: 1.4; marker-end: url(#head); }
"""
HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path fill="#8b929c" d="M0 0L8 4L0 8z"/></marker>'
)


def text(x: int, y: int, content: str, style: str = "", anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def rectangle(style: str, x: int, y: int, width: int, height: int) -> str:
    return f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def lines_of(names: list[str], width: int) -> list[str]:
    return wrap(", ".join(names), int((width - 20) / LETTER))


def box(x: int, y: int, width: int, height: int, title: str, names: list[str]) -> list[str]:
    """A room: its name, the number of its modules, and their names."""
    return [
        rectangle("box", x, y, width, height),
        text(x + 10, y + 19, title, "title"),
        text(x + width - 10, y + 19, str(len(names)), anchor="end"),
        *(text(x + 10, y + 36 + LINE * k, line) for k, line in enumerate(lines_of(names, width))),
    ]


class House:
    """A package in its frame, `width` wide, the upper left corner at (left, top)."""

    def __init__(self, package: str, short: str, left: int, top: int, width: int) -> None:
        self.package, self.rooms, self.door = package, ROOMS[package], f"import {package} as {short}"
        self.left, self.top, self.width = left, top, width
        self.uses = arrows(package)
        self.floor = floors(self.uses)
        columns = 1 + max(column for columns in self.rooms.values() for column in columns)
        self.column = (width - 2 * MARGIN - (columns - 1) * GUTTER) // columns
        self.names = {room: modules(f"{package}/{room}") for room in self.rooms}
        self.box = TITLE + LINE * max(len(lines_of(names, self.column)) for names in self.names.values())
        self.height = DOOR + max(self.floor.values()) * (self.box + STOREY) + self.box + MARGIN
        self.lanes = dict.fromkeys(range(columns), 0)

    def place(self, room: str) -> tuple[int, int, int]:
        """x, y and width of a room."""
        first, last = self.rooms[room][0], self.rooms[room][-1]
        x = self.left + MARGIN + first * (self.column + GUTTER)
        y = self.top + self.height - MARGIN - self.box - self.floor[room] * (self.box + STOREY)
        return x, y, self.column + (last - first) * (self.column + GUTTER)

    def draw(self) -> list[str]:
        middle, inside = self.left + self.width // 2, self.width - 2 * MARGIN
        lines = [
            rectangle("frame", self.left, self.top, self.width, self.height),
            rectangle("door", self.left + MARGIN, self.top + MARGIN, inside, 30),
            text(middle, self.top + MARGIN + 20, self.door, "command", "middle"),
        ]
        for room in self.rooms:
            x, y, width = self.place(room)
            lines += box(x, y, width, self.box, room, self.names[room])
        return lines + [self.arrow(room, other) for room in self.rooms for other in sorted(self.uses[room])]

    def arrow(self, room: str, other: str) -> str:
        """Straight down where the rooms share a column, else through the gutter beside the room that is imported."""
        x, y, width = self.place(room)
        to_x, to_y, to_width = self.place(other)
        if set(self.rooms[room]) & set(self.rooms[other]):
            middle = (x + width // 2) if width <= to_width else to_x + to_width // 2
            return f'<path class="arrow" d="M{middle} {y + self.box}V{to_y - 1}"/>'
        rightward = to_x > x
        gutter = self.rooms[other][0] - 1 if rightward else self.rooms[other][-1]
        self.lanes[gutter] += 1
        start, end = (x + width, to_x - 1) if rightward else (x, to_x + to_width + 1)
        lane = self.left + MARGIN + self.column + gutter * (self.column + GUTTER) + LANE * self.lanes[gutter]
        return f'<path class="arrow" d="M{start} {y + self.box // 2}H{lane}V{to_y + self.box // 2}H{end}"/>'


def down(x: int, start: int, end: int) -> str:
    return f'<path class="arrow" d="M{x} {start}V{end - 1}"/>'


def picture() -> str:
    """The scripts above nn_adapters above pdeopt, as an SVG."""
    gap, scripts = 34, TITLE + LINE * len(lines_of(modules("problems"), WIDTH)) + 6
    nn = House("nn_adapters", "nna", 1, scripts + gap, WIDTH - 60)
    pdeopt = House("pdeopt", "po", 1, nn.top + nn.height + gap, WIDTH - 2)
    used = set().union(*(imports(f"nn_adapters/{room}") for room in ROOMS["nn_adapters"]))
    label = ", ".join(room for room in ROOMS["pdeopt"] if f"pdeopt/{room}" in used)
    lines = [
        *box(1, 1, WIDTH - 2, scripts - 1, "problems", modules("problems")),
        *nn.draw(),
        *pdeopt.draw(),
        down(WIDTH // 2, scripts, nn.top),
        down(WIDTH - 30, scripts, pdeopt.top),
        down(WIDTH // 2, nn.top + nn.height, pdeopt.top),
        text(WIDTH // 2 + 10, pdeopt.top - 13, label, "label"),
    ]
    height = pdeopt.top + pdeopt.height + 1
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>The rooms of pdeopt and nn_adapters</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{HEAD}</defs>",
            *lines,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
