"""DOLFINx, loaded when it is first needed, and what differs between its versions: 0.5 of Debian, and 0.9 and later.

Forms are assembled over the cells of the calling rank, without messages: what ranks that share a mesh have of rows of
others is exchanged by `entries` and `Layout`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.core.arrays import Array, index_array
from pdeopt.core.errors import InputError

#: Seconds that a rank waits for another one to compile the same form.
COMPILE_TIMEOUT = 120


@lru_cache(maxsize=1)
def packages() -> SimpleNamespace:
    """`fem` of DOLFINx, `ufl` and its functions of forms. Raises `InputError` where they are not installed."""
    try:
        import dolfinx
        import dolfinx.fem.petsc  # newer versions do not load it by themselves
        import ufl
        from ufl.algorithms import estimate_total_polynomial_degree, expand_derivatives
        from ufl.algorithms.apply_integral_scaling import apply_integral_scaling
    except ImportError as error:
        legal = "DOLFINx 0.5, or 0.9 and later: make setup-fenicsx"
        raise InputError("weak forms", f"no DOLFINx ({error})", legal) from None
    return SimpleNamespace(
        fem=dolfinx.fem,
        ufl=ufl,
        expand=expand_derivatives,
        scale=apply_integral_scaling,
        degree=estimate_total_polynomial_degree,
    )


def function_space(mesh: Any, element: Any) -> Any:
    """A space of functions on a mesh, whatever the version of DOLFINx.

    Args:
        mesh: of DOLFINx, made with MPI.COMM_SELF, or with `grid.space_comm` where ranks share a step.
        element: ("Lagrange", 1), or an element of UFL or Basix.
    """
    fem = packages().fem
    with _quiet():  # elements are compiled, too
        return fem.functionspace(mesh, element) if hasattr(fem, "functionspace") else fem.FunctionSpace(mesh, element)


def coefficients(space: Any) -> tuple[Any, int, Array]:
    """The ranks that share the mesh of a space, how many coefficients this one owns, all components counted, and the
    global numbers of its ghosts."""
    rows, size = space.dofmap.index_map, space.dofmap.index_map_bs
    ghosts = np.asarray(rows.ghosts, dtype=np.int64)[:, None] * size + np.arange(size)
    return space.mesh.comm, int(rows.size_local * size), ghosts.ravel()


def dimension(space: Any) -> int:
    """Coefficients that this rank has of a function of a space: owned ones and ghosts, all components."""
    _, owned, ghosts = coefficients(space)
    return owned + len(ghosts)


def cell_coefficients(space: Any) -> Array:
    """The coefficients of each cell that this rank has, local numbers, (cells, k)."""
    dofs, size = space.dofmap.list, space.dofmap.index_map_bs
    blocks = dofs.array.reshape(dofs.num_nodes, -1) if hasattr(dofs, "num_nodes") else np.asarray(dofs)
    found: Array = (blocks[:, :, None].astype(np.int64) * size + np.arange(size)).reshape(len(blocks), -1)
    return found


def node_places(space: Any) -> Array | None:
    """Where the coefficients of this rank stand, (coefficients, 4): the point, and the number of the component.

    None for elements whose coefficients are no values at points.
    """
    size = space.dofmap.index_map_bs
    if size == 1 and space.num_sub_spaces:
        out, first = np.zeros((dimension(space), 4)), 0
        for k in range(space.num_sub_spaces):
            part, dofs = space.sub(k).collapse()
            places = node_places(part)
            if places is None:
                return None
            out[np.asarray(dofs)] = places + np.array([0, 0, 0, first])
            first += 1 + int(places[:, -1].max(initial=0.0))
        return out
    try:
        points = np.repeat(space.tabulate_dof_coordinates(), size, axis=0)
    except RuntimeError:
        return None
    found: Array = np.c_[points, np.arange(len(points)) % size]
    return found


def part_of(space: Any) -> tuple[Any, Any, int]:
    """A function for values of a space or of a part of a mixed one, V.sub(0).

    Returns:
        The function, of a space of its own where it is of a part; the places of its coefficients among those of the
        whole that this rank has; and how many these are.
    """
    size = dimension(space)
    if len(space.component()) == 0:
        return packages().fem.Function(space), slice(None), size
    with _quiet():
        own, places = space.collapse()
        return packages().fem.Function(own), np.asarray(places), size


def write_function(path: Path, function: Any, times: Array, rows: Array) -> None:
    """A function at several times as a .pvd with its files. Collective where ranks share the mesh.

    Args:
        path: of the .pvd, which is written once more when the file goes out of scope: here.
        function: of a space of its own; its values are overwritten.
        times, rows: (batch,), and its coefficients on this rank, (batch, size).
    """
    from dolfinx import io

    with io.VTKFile(function.function_space.mesh.comm, str(path), "w") as file:
        for t, row in zip(times, rows):
            function.x.array[:] = row
            file.write_function(function, float(t))


def default_partitioner() -> Any:
    """What cuts the cells of a mesh for ranks, as DOLFINx does unless told otherwise."""
    from dolfinx import mesh

    try:
        return mesh.create_cell_partitioner(mesh.GhostMode.shared_facet)
    except TypeError:  # of DOLFINx 0.5, which says how to its partitioner
        return mesh.create_cell_partitioner()


def list_of(values: Array, offsets: Array) -> Any:
    """A list of lists as DOLFINx has it: values[offsets[k] : offsets[k + 1]] is the k-th."""
    from dolfinx import graph

    make = getattr(graph, "adjacencylist", None) or graph.create_adjacencylist
    return make(values.astype(np.int32), offsets.astype(np.int32))


def with_degrees(form: Any) -> Any:
    """The form with the degree of its quadrature said, as UFL would choose it.

    For a derivative UFL chooses anew, and where the integrand is no polynomial otherwise: F' of another F.
    """
    ufl, integrals = packages().ufl, []
    for integral in packages().expand(form).integrals():
        metadata = dict(integral.metadata())
        if metadata.get("quadrature_degree", "default") in (None, "default", "auto", -1):
            (scaled,) = packages().scale(ufl.Form([integral])).integrals()  # by the mesh's Jacobian determinant
            metadata["quadrature_degree"] = packages().degree(scaled.integrand())
        integrals.append(integral.reconstruct(metadata=metadata))
    return ufl.Form(integrals)


def compiled(form: Any) -> Any:
    """A form of UFL, compiled; one of an earlier run is found in the cache of DOLFINx."""
    fem, options = packages().fem, {"timeout": COMPILE_TIMEOUT}
    with _quiet():
        if hasattr(fem, "functionspace"):
            return fem.form(form, jit_options=options)
        return fem.form(form, jit_params=options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's command lines, which would go through Python's root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def scalar(form: Any) -> float:
    """The value of a compiled functional over the cells of this rank."""
    return float(packages().fem.assemble_scalar(form))


def vector(form: Any, size: int) -> Array:
    """A compiled linear form applied to all basis functions over the cells of this rank, (size,)."""
    out = np.zeros(size)
    packages().fem.assemble_vector(out, form)  # native assembly adds
    return out


class AssembledMatrix:
    """The matrix of a compiled bilinear form over the cells of this rank, assembled again and again.

    Args:
        form: compiled.
        spaces: of its test and trial functions.

    Attributes:
        pattern: all entries that the form may have, as a scipy matrix over the coefficients that this rank has;
            `values` are in the order of its data.
    """

    def __init__(self, form: Any, spaces: tuple[Any, Any]) -> None:
        self._form, self._assemble = form, packages().fem.petsc.assemble_matrix
        is_shared = spaces[0].mesh.comm.size > 1
        self._matrix = _local_matrix(*spaces) if is_shared else packages().fem.petsc.create_matrix(form)
        # entries that are not filled before the first assembly would leave the pattern
        starts, columns, data = (part.copy() for part in self._filled().getValuesCSR())
        self.pattern = sp.csr_matrix((np.ones(len(data)), columns, starts), shape=self._matrix.getSize())

    def values(self) -> Array:
        """The entries at what functions and constants hold now, (nnz,)."""
        values: Array = self._filled().getValuesCSR()[2]
        return values

    def _filled(self) -> Any:
        self._matrix.zeroEntries()
        self._assemble(self._matrix, self._form)
        self._matrix.assemble()
        return self._matrix


def _local_matrix(rows: Any, columns: Any) -> PETSc.Mat:
    """An empty matrix of this rank alone over the coefficients that it has, with room for what its cells couple."""
    incidences = [_incidence(space) for space in (rows, columns)]
    room = np.diff(sp.csr_matrix(incidences[0].T @ incidences[1]).indptr)
    matrix = PETSc.Mat().create(PETSc.COMM_SELF)
    sizes = [dimension(space) for space in (rows, columns)]
    blocks = [space.dofmap.index_map_bs for space in (rows, columns)]
    matrix.setSizes([(size, size) for size in sizes])
    matrix.setType(PETSc.Mat.Type.AIJ)
    matrix.setBlockSizes(*blocks)
    matrix.setPreallocationNNZ(index_array(room))
    matrix.setLGMap(*(_identity(size, block) for size, block in zip(sizes, blocks)))
    return matrix


def _incidence(space: Any) -> sp.csr_matrix:
    """Which cells have which coefficients, (cells, coefficients)."""
    lists = cell_coefficients(space)
    starts = np.arange(0, lists.size + 1, lists.shape[1])
    return sp.csr_matrix((np.ones(lists.size), lists.ravel(), starts), shape=(len(lists), dimension(space)))


def _identity(size: int, block: int) -> PETSc.LGMap:
    return PETSc.LGMap().create(index_array(np.arange(size // block)), bsize=block, comm=PETSc.COMM_SELF)


def fixed_dofs(bcs: Sequence[Any], space: Any) -> Array:
    """Coefficients of this rank that Dirichlet conditions fix. Raises `InputError` for those of another space."""
    found = []
    for k, bc in enumerate(bcs):
        its = getattr(bc, "function_space", None)
        if its is None:
            legal = "dolfinx.fem.dirichletbc(value, dofs, space) of the space of u_new"
            raise InputError(f"bcs[{k}]", type(bc).__name__, legal)
        if not _contains(space, its):
            legal = "those of the space of u_new or of one of its subspaces, V.sub(i)"
            raise InputError(f"bcs[{k}]", "a condition on another function space", legal)
        found.append(bc.dof_indices()[0])
    return np.unique(np.concatenate(found)) if found else np.array([], dtype=int)


def _contains(space: Any, other: Any) -> bool:
    whole, part = (getattr(each, "_cpp_object", each) for each in (space, other))
    return whole is part or bool(whole == part) or bool(whole.contains(part))


def set_fixed(bcs: Sequence[Any], values: Array) -> None:
    """Write what the Dirichlet conditions say now into values of all coefficients of this rank, (dimension,)."""
    fem = packages().fem
    if hasattr(fem, "set_bc"):
        fem.set_bc(values, bcs)
        return
    for bc in bcs:
        bc.set(values)
