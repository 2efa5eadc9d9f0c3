"""DOLFINx, loaded when it is first needed, and what differs between its versions: 0.5 of Debian, and 0.9 and later.

Forms are assembled on the calling rank alone: every rank of a time grid has the whole mesh.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse as sp

from pdeopt.core.arrays import Array
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
        mesh: of DOLFINx, made with MPI.COMM_SELF.
        element: ("Lagrange", 1), or an element of UFL or Basix.
    """
    fem = packages().fem
    with _quiet():  # elements are compiled, too
        return fem.functionspace(mesh, element) if hasattr(fem, "functionspace") else fem.FunctionSpace(mesh, element)


def dimension(space: Any) -> int:
    """Unknowns of a function space, those of all components counted."""
    return int(space.dofmap.index_map.size_local * space.dofmap.index_map_bs)


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
    """The value of a compiled functional."""
    return float(packages().fem.assemble_scalar(form))


def vector(form: Any, size: int) -> Array:
    """A compiled linear form applied to all basis functions, (size,)."""
    out = np.zeros(size)
    packages().fem.assemble_vector(out, form)  # native assembly adds
    return out


class AssembledMatrix:
    """The matrix of a compiled bilinear form, assembled again and again.

    Args:
        form: compiled.

    Attributes:
        pattern: all entries that the form may have, as a scipy matrix; `values` are in the order of its data.
    """

    def __init__(self, form: Any) -> None:
        self._form, self._assemble = form, packages().fem.petsc.assemble_matrix
        self._matrix = packages().fem.petsc.create_matrix(form)
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


def fixed_dofs(bcs: Sequence[Any], space: Any) -> Array:
    """The unknowns of a space that Dirichlet conditions fix, sorted. Raises `InputError` for those of another space."""
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
    """Write what the Dirichlet conditions say now into values of all unknowns, (dimension,)."""
    fem = packages().fem
    if hasattr(fem, "set_bc"):
        fem.set_bc(values, bcs)
        return
    for bc in bcs:
        bc.set(values)
