"""Fields of all steps as a series of files for ParaView, written by the ranks of each step together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.errors import InputError, on_root
from pdeopt.space.layouts.partition import Patch, petsc_grid
from pdeopt.steps.timegrid import TimeGrid


def write_series(
    path: str, grid: TimeGrid, patch: Patch, fields: Mapping[str, Tensor], box: Sequence[tuple[float, float]]
) -> None:
    """Fields at the nodes of a structured grid as FILE.pvd, and a folder FILE with a .vts for each field and step.

    No rank has more than its own rows: PETSc writes a step from the ranks that share it, all places in time at once.
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
    target = Path(path)
    if target.suffix != ".pvd":
        raise InputError("series of files", path, "a name that ends in .pvd")
    shape = (grid.n_local, patch.layout.n_owned)
    for name, rows in fields.items():
        if tuple(rows.shape) != shape:
            raise InputError(f"field {name}", f"shape {tuple(rows.shape)}", f"shape {shape}")
    folder = target.with_suffix("")
    on_root(grid.mpi, lambda: folder.mkdir(parents=True, exist_ok=True))
    da = petsc_grid(patch, grid.space_comm)
    ends = [end for each in reversed(box) for end in each]  # PETSc's first axis is the last of arrays
    da.setUniformCoordinates(*ends, *[0.0, 1.0] * (3 - len(box)))
    vector = da.createGlobalVec()
    for name, rows in fields.items():
        vector.setName(name)
        for step, values in enumerate(rows.detach().numpy(), start=grid.begin + 1):
            vector.setArray(values)
            viewer = PETSc.Viewer().createVTK(str(folder / _file(name, step)), "w", comm=grid.space_comm)
            vector.view(viewer)
            viewer.destroy()
    vector.destroy()
    da.destroy()
    grid.mpi.barrier()  # all files are there before the list of them
    on_root(grid.mpi, lambda: target.write_text(_collection(grid, folder.name, list(fields))))


def _file(name: str, step: int) -> str:
    return f"{name}_{step:06d}.vts"


def _collection(grid: TimeGrid, folder: str, names: list[str]) -> str:
    lines = [
        f'<DataSet timestep="{grid.times[step]:.17g}" part="{part}" name={quoteattr(name)} '
        f"file={quoteattr(f'{folder}/{_file(name, step)}')}/>"
        for step in range(1, grid.num_steps + 1)
        for part, name in enumerate(names)
    ]
    head = '<?xml version="1.0"?>\n<VTKFile type="Collection" version="0.1"><Collection>\n'
    return head + "\n".join(lines) + "\n</Collection></VTKFile>\n"
