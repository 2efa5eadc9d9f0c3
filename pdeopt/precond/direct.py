"""Exact solves with assembled KKT matrices: by LAPACK where few unknowns a step make a narrow band, else by MUMPS, or
by PETSc's own LU where PETSc has no MUMPS.

PETSc's LU does not pivot, and a KKT matrix has zeros on its diagonal. Its rows are therefore paired with
other columns: the constraint F_i with the state u_i and the adjoint equation of u_i with lam_i, so that the
diagonal holds A_i, Wzz and A_i', which is what time stepping inverts anyway. The steps keep their order:
fill stays inside neighboring steps, cost and memory grow linearly with their number.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc
from scipy.linalg import lapack

from pdeopt.core.arrays import Array, index_array
from pdeopt.core.errors import SolveFailure
from pdeopt.core.options import set_default
from pdeopt.kkt.layout import KKTLayout
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.base import Preconditioner
from pdeopt.steps.stepsolve import natural_lu

#: States, multipliers and controls of a step up to which the matrix is factored as one band.
NARROW_STEP = 12

#: MUMPS' orders of elimination: QAMD is quick and bears dense rows, as of parameters; PORD dissects, and leaves of a
#: plane over time a third of the entries.
QAMD, PORD = "6", "4"


class KKTDirectPC(Preconditioner):
    """LU of the assembled KKT matrix, factored whole on every rank (as PCREDUNDANT does).

    Args:
        layout: of the KKT vectors.
    """

    def __init__(self, layout: KKTLayout) -> None:
        rows, cols = layout.pairing()
        self._rows = PETSc.IS().createGeneral(index_array(rows), comm=PETSc.COMM_SELF)
        self._cols = PETSc.IS().createGeneral(index_array(cols), comm=PETSc.COMM_SELF)
        self._gather: PETSc.Scatter | None = None

    def update(self, pc: PETSc.PC) -> None:
        matrix = pc.getOperators()[1]
        everything = PETSc.IS().createStride(matrix.getSize()[0], 0, 1, comm=PETSc.COMM_SELF)
        (whole,) = matrix.createSubMatrices(everything, everything)
        ordered = whole.permute(self._rows, self._cols)  # rows and columns in the order of the pivots
        indptr, indices, values = ordered.getValuesCSR()
        self._factor = natural_lu(sp.csr_matrix((values, indices, indptr), shape=ordered.getSize()))
        for matrix in (whole, ordered):
            matrix.destroy()

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        if self._gather is None:
            self._gather, self._all = PETSc.Scatter.toAll(x)
        self._gather.scatter(x, self._all, mode=PETSc.ScatterMode.FORWARD)
        right = self._all.duplicate()
        right.setArray(self._all.getArray(readonly=True)[self._rows.getIndices()])
        left = right.duplicate()
        self._factor.solve(right, left)
        solution = self._all.getArray()
        solution[self._cols.getIndices()] = left.getArray(readonly=True)
        start, end = y.getOwnershipRange()
        y.setArray(solution[start:end])


class KKTBandPC(Preconditioner):
    """LU of the assembled KKT matrix as one band, its unknowns step by step, on one rank.

    Args:
        layout: of the KKT vectors.
    """

    def __init__(self, layout: KKTLayout) -> None:
        self._order, _ = layout.pairing()  # lam_i, z_i and u_i of each step
        self._places: tuple[Array, Array, int] | None = None

    def update(self, pc: PETSc.PC) -> None:
        starts, columns, values = pc.getOperators()[1].getValuesCSR()
        if self._places is None:
            place = np.argsort(self._order)
            row, col = np.repeat(place, np.diff(starts)), place[columns]
            self._places = row - col, col, int(np.abs(row - col).max())
        distance, col, width = self._places
        band = np.zeros((len(self._order), 3 * width + 1))  # columns of LAPACK's storage
        band[col, 2 * width + distance] = values
        self._width = width
        self._factor, self._pivots, info = lapack.dgbtrf(band.T, width, width, overwrite_ab=1)
        if info or not np.isfinite(values).all():
            raise SolveFailure(
                "the KKT matrix is singular or not finite", "see the residual and the objective's Hessian"
            )

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        right = x.getArray(readonly=True)[self._order]
        left, _ = lapack.dgbtrs(self._factor, self._width, self._width, right, self._pivots)
        solution = np.empty_like(left)
        solution[self._order] = left
        y.setArray(solution)

    @staticmethod
    def fits(layout: KKTLayout) -> bool:
        """Whether the band is narrow: few states and controls a step, no parameters, one rank."""
        problem = layout.problem
        is_plain = type(layout) is KKTLayout and problem.control_map is None and problem.param_dim == 0
        return is_plain and problem.grid.mpi.size == 1 and 2 * problem.n + problem.m <= NARROW_STEP


def use_direct(pc: PETSc.PC, layout: KKTLayout) -> None:
    """Make `pc` the best factorization for KKT matrices that this PETSc has.

    Args:
        pc: whose matrix is that of `KKTOperator.assemble`, or of the coupled form; its prefix is set.
        layout: of the KKT vectors.
    """
    if KKTBandPC.fits(layout):
        pc.setType("python")
        pc.setPythonContext(KKTBandPC(layout))
    elif PETSc.Sys.hasExternalPackage("mumps"):
        pc.setType("cholesky")
        pc.setFactorSolverType("mumps")
        prefix = pc.getOptionsPrefix() or ""  # MUMPS reads no other place before its analysis
        set_default(f"{prefix}mat_mumps_icntl_7", QAMD if layout.problem.param_dim else PORD)
        set_default(f"{prefix}mat_mumps_icntl_12", "1")  # no order by values: a restart factors as the whole run did
        set_default(f"{prefix}mat_mumps_icntl_14", "100")  # room for delayed pivots, in per cent
    else:
        pc.setType("python")
        pc.setPythonContext(KKTDirectPC(layout))


def factor_kkt(operator: KKTOperator) -> PETSc.KSP:
    """A solver with the factors of the operator's matrix; the caller destroys it and frees the operator. Collective.

    Args:
        operator: at a point; its matrix is assembled here.

    Raises:
        InputError: the constraint has no sparsity pattern.
    """
    ksp = PETSc.KSP().create(operator.problem.grid.comm)
    ksp.setOperators(operator.assemble())
    ksp.setType("preonly")
    use_direct(ksp.getPC(), operator.layout)
    return ksp
