"""Exact solves with assembled KKT matrices: by MUMPS, or by PETSc's own LU where PETSc has no MUMPS.

PETSc's LU does not pivot, and a KKT matrix has zeros on its diagonal. Its rows are therefore paired with
other columns: the constraint F_i with the state u_i and the adjoint equation of u_i with lam_i, so that the
diagonal holds A_i, Wzz and A_i', which is what time stepping inverts anyway. The steps keep their order:
fill stays inside neighboring steps, cost and memory grow linearly with their number.
"""

from __future__ import annotations

import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.core.arrays import index_array
from pdeopt.core.options import set_default
from pdeopt.kkt.layout import KKTLayout
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.base import Preconditioner
from pdeopt.steps.stepsolve import natural_lu


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


def use_direct(pc: PETSc.PC, layout: KKTLayout) -> None:
    """Make `pc` the best factorization for KKT matrices that this PETSc has.

    Args:
        pc: whose matrix is that of `KKTOperator.assemble`, or of the coupled form; its prefix is set.
        layout: of the KKT vectors.
    """
    if PETSc.Sys.hasExternalPackage("mumps"):
        pc.setType("cholesky")
        pc.setFactorSolverType("mumps")
        prefix = pc.getOptionsPrefix() or ""  # MUMPS reads no other place before its analysis
        set_default(f"{prefix}mat_mumps_icntl_7", "6")  # QAMD: quick, and parameters make dense rows
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
