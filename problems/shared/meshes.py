"""Meshes of the plane from files, checked before they are used: a wrong index or a folded cell would be a wrong answer.

meshio reads some thirty formats, none of which limits what it allocates; while it reads, the process may grow by no
more than the file may expand to.
"""

from __future__ import annotations

import contextlib
import io
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import skfem
from skfem.io.meshio import from_meshio

import pdeopt as po
from nn_adapters.data.limits import LIMIT_MB, Allowance, regular_file
from pdeopt.core.arrays import Array

#: Kinds of cells that make a mesh of the plane, and those that name its boundary.
PLANE, BOUNDARY = ("triangle", "quad"), ("vertex", "line")

#: Area of a cell, relative to the square of its longest edge, at which it has none.
FLAT = 1e-12

#: Bytes that reading takes beside the mesh, as for modules that are imported by then.
READING = 2**28


def read_mesh(file: str) -> skfem.Mesh:
    """A mesh of triangles or of quadrilaterals from any file that meshio reads.

    Args:
        file: its name.

    Raises:
        InputError: no file of a mesh; other cells; points that are not finite or not in a plane; cells with points that
            are not there, without area, not convex, or that overlap a neighbor.
    """
    if not regular_file(file):
        raise po.InputError("-mesh", f"{file}, which is no file", "a mesh file that meshio can read")
    found = _meshio(file)
    kinds = sorted({block.type for block in found.cells if block.type not in BOUNDARY})
    if len(kinds) != 1 or kinds[0] not in PLANE:
        raise po.InputError("-mesh", f"{file} with cells {', '.join(kinds) or 'none'}", "triangles or quadrilaterals")
    wrong = _wrong_points(found) or _wrong_cells(np.asarray(found.points, float), found.cells_dict[kinds[0]])
    if wrong:
        raise po.InputError(
            f"-mesh {file}", wrong, "cells with an area, side by side, between finite points of a plane"
        )
    return _refusing(file, lambda: from_meshio(found))


def _meshio(file: str) -> Any:
    import meshio

    quiet = io.StringIO()  # meshio prints why it fails, and exits
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), _bounded(file):
        return _refusing(file, lambda: meshio.read(file))


def _refusing(file: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (Exception, SystemExit) as error:  # every format fails in a way of its own
        reason = " ".join(f"{error!r}".split())[:200]
        raise po.InputError("-mesh", f"{file} ({reason})", "a mesh file that meshio can read") from None


@contextlib.contextmanager
def _bounded(file: str) -> Iterator[None]:
    """Let the process grow by no more than the file may expand to, where the system tells how large it is."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    now = int(pages.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + READING + int(Allowance(file, LIMIT_MB).bytes)
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _wrong_points(found: Any) -> str:
    """What is wrong with the points or with the indices of the cells; empty if nothing is."""
    points = np.asarray(found.points)
    if points.ndim != 2 or points.shape[1] not in (2, 3) or points.dtype.kind not in "iuf":
        return f"points of shape {points.shape}, {points.dtype}"
    if not np.isfinite(points).all():
        return "points that are not finite"
    for block in found.cells:
        cells = np.asarray(block.data)
        if cells.dtype.kind not in "iu" or (cells.size and not 0 <= cells.min() <= cells.max() < len(points)):
            return f"a {block.type} with a point that is none of the {len(points)}"
    return ""


def _wrong_cells(points: Array, cells: Array) -> str:
    """What is wrong with the geometry: points (n, 2 or 3), cells (m, 3 or 4); empty if nothing is."""
    if len(cells) == 0:
        return "no cells"
    corners = points[cells]
    lengths = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1)
    if points.shape[1] == 3 and np.ptp(corners[:, :, 2]) > FLAT * np.ptp(corners, axis=(0, 1)).max():
        return "points that are not in a plane z = constant"
    x, y = corners[:, :, 0], corners[:, :, 1]
    areas = _turns(x, y, np.roll(x, -1, axis=1), np.roll(y, -1, axis=1), np.roll(x, -2, axis=1), np.roll(y, -2, axis=1))
    flat = (np.abs(areas) <= FLAT * lengths[:, None] ** 2).any(1)
    if (bad := flat | (np.ptp(np.sign(areas), axis=1) != 0)).any():
        return f"cell {int(np.flatnonzero(bad)[0])} without area or not convex"
    return _overlap(cells, x, y)


def _overlap(cells: Array, x: Array, y: Array) -> str:
    """Edges of more than two cells, or of two that lie on the same side."""
    edges = np.sort(np.stack([cells, np.roll(cells, -1, axis=1)], axis=2).reshape(-1, 2), axis=1)
    _, edge, count = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
    edge = edge.ravel()
    if count.max() > 2:
        return "an edge of more than two cells"
    swap = (cells > np.roll(cells, -1, axis=1)).ravel()
    ends = [np.stack([v, np.roll(v, -1, axis=1)], axis=2).reshape(-1, 2) for v in (x, y)]
    (ax, bx), (ay, by) = (np.where(swap, v.T[::-1], v.T) for v in ends)
    middle = [np.repeat(v.mean(1), cells.shape[1]) for v in (x, y)]
    side = np.bincount(edge, np.sign(_turns(ax, ay, bx, by, *middle)))
    if (side[count == 2] != 0).any():
        return "neighboring cells that overlap"
    return ""


def _turns(ax: Array, ay: Array, bx: Array, by: Array, cx: Array, cy: Array) -> Array:
    """Twice the signed area of the triangles a, b, c."""
    return np.asarray((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
