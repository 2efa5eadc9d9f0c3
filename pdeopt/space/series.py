"""Fields of all steps as a series of files for ParaView, written by the ranks of each step together.

A series is FILE.pvd, which lists times, names and files, and a folder FILE with these: of nodes of a structured grid by
PETSc, of functions on a mesh by DOLFINx. No rank has more than its own rows; all places in time write at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError, on_root
from pdeopt.space.fenicsx import part_of, write_function
from pdeopt.space.layouts.partition import Patch, petsc_grid
from pdeopt.steps.timegrid import TimeGrid


class Entry(NamedTuple):
    """A line of the list: a time, the number and the name of a field, and its file in the folder."""

    time: float
    part: int
    name: str
    file: str


def write_series(
    path: str, grid: TimeGrid, patch: Patch, fields: Mapping[str, Tensor], box: Sequence[tuple[float, float]]
) -> None:
    """Fields at the nodes of a structured grid, a .vts for each field and step.

    Collective; an error of one rank is raised on all where it is about files.

    Args:
        path: of the .pvd, which is replaced.
        grid: the steps.
        patch: the nodes, as `grid_layout` made them for `grid.space_comm`.
        fields: by names, rows of this rank, (n_local, n_owned).
        box: least and largest coordinate of the nodes by axis, in the order of the grid's axes.

    Raises:
        InputError: another ending than .pvd, or fields of another shape.
        OSError: the files cannot be written.

    Example:
        >>> write_series("heat.pvd", grid, patch, {"state": u}, [(h, 1 - h)] * 3)
    """
    folder = _folder(path, grid)
    for name, rows in fields.items():
        _require_shape(name, rows, (grid.n_local, patch.layout.n_owned))
    da = petsc_grid(patch, grid.space_comm)
    ends = [end for each in reversed(box) for end in each]  # PETSc's first axis is the last of arrays
    da.setUniformCoordinates(*ends, *[0.0, 1.0] * (3 - len(box)))
    vector, entries = da.createGlobalVec(), list[Entry]()
    for part, (name, rows) in enumerate(fields.items()):
        vector.setName(name)
        for step, values in enumerate(rows.detach().numpy(), start=grid.begin + 1):
            entries.append(Entry(float(grid.times[step]), part, name, f"{name}_{step:06d}.vts"))
            vector.setArray(values)
            viewer = PETSc.Viewer().createVTK(str(folder / entries[-1].file), "w", comm=grid.space_comm)
            vector.view(viewer)
            viewer.destroy()
    vector.destroy()
    da.destroy()
    _write_list(path, grid, entries)


def write_functions(path: str, grid: TimeGrid, fields: Mapping[str, tuple[Any, Any]]) -> None:
    """Functions of a weak form, a .pvtu for each field and step, with a .vtu of each rank that shares the step.

    Collective; an error of one rank is raised on all where it is about files.

    Args:
        path: of the .pvd, which is replaced.
        grid: the steps.
        fields: by names, a space of Lagrange or piecewise constant functions and the coefficients that this rank has,
            (n_local, coefficients), as `FormConstraint.values` gives them; of a mixed space a part, `V.sub(0)`, with
            the coefficients of the whole.

    Raises:
        InputError: another ending than .pvd, or coefficients of another shape.
        OSError: the files cannot be written.

    Example:
        >>> u, z, _ = problem.unpack(result)
        >>> write_functions("flow.pvd", problem.grid, {"velocity": (V.sub(0), flow.values(u))})
    """
    folder, entries = _folder(path, grid), list[Entry]()
    for part, (name, (space, values)) in enumerate(fields.items()):
        function, places, size = part_of(space)
        _require_shape(name, values, (grid.n_local, size))
        function.name = name
        own = folder / f"{name}_{grid.begin + 1:06d}_.pvd"  # the list of DOLFINx, of the steps of this rank
        write_function(own, function, grid.times[grid.begin + 1 :], values[:, places])
        space.mesh.comm.barrier()
        if grid.space_comm.rank == 0:
            listed = ElementTree.parse(own).iter("DataSet")
            entries += [Entry(float(line.attrib["timestep"]), part, name, line.attrib["file"]) for line in listed]
            own.unlink()
    _write_list(path, grid, entries)


def _folder(path: str, grid: TimeGrid) -> Path:
    """The folder of the files, which is made. Collective."""
    target = Path(path)
    if target.suffix != ".pvd":
        raise InputError("series of files", path, "a name that ends in .pvd")
    folder = target.with_suffix("")
    on_root(grid.mpi, lambda: folder.mkdir(parents=True, exist_ok=True))
    return folder


def _require_shape(name: str, rows: Tensor | Array, shape: tuple[int, int]) -> None:
    if tuple(rows.shape) != shape:
        raise InputError(f"field {name}", f"shape {tuple(rows.shape)}", f"shape {shape}")


def _write_list(path: str, grid: TimeGrid, entries: Sequence[Entry]) -> None:
    """FILE.pvd of the entries of all ranks, when all files are there. Collective."""
    found, target = grid.mpi.gather(entries), Path(path)
    folder = target.with_suffix("").name
    on_root(grid.mpi, lambda: target.write_text(_collection(folder, sorted(set(chain.from_iterable(found))))))


def _collection(folder: str, entries: Iterable[Entry]) -> str:
    lines = [
        f'<DataSet timestep="{entry.time:.17g}" part="{entry.part}" name={quoteattr(entry.name)} '
        f"file={quoteattr(f'{folder}/{entry.file}')}/>"
        for entry in entries
    ]
    head = '<?xml version="1.0"?>\n<VTKFile type="Collection" version="0.1"><Collection>\n'
    return head + "\n".join(lines) + "\n</Collection></VTKFile>\n"
