"""Solving with PETSc matrices of steps on any communicator: Krylov methods with multigrid, or MUMPS.

A matrix lives on one rank or is spread over several; the right-hand sides are the rows (batch, n) of the steps, of
which a rank has its own unknowns. Set-up is done once, whatever their number. Factors are applied to all of them at
once; multigrid gains nothing by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from petsc4py import PETSc

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError, StepFailure
from pdeopt.core.options import defaults
from pdeopt.core.settings import Settings, read, setting

#: Relative residual of a step solve, unless `-step_ksp_rtol` or `loosened` says otherwise.
RTOL = 1e-10

#: What a matrix and its transpose may differ by to count as one.
SYMMETRIC = 1e-13

REMEDY = "see -step_ksp_monitor; -step_ksp_max_it and -step_pc_type hypre | gamg change it, lu is direct"


@dataclass(frozen=True)
class StepSettings(Settings, prefix="step_"):
    """Linear systems of single steps.

    `-step_ksp_...` and `-step_pc_...` reach PETSc where they are solved by a Krylov method.
    """

    pc_type: str = setting(
        "auto",
        "solver inside a step: factors, or a preconditioner of a Krylov method; auto is multigrid where factors fill",
        choices=("auto", "lu", "hypre", "gamg", "bjacobi"),
    )


_tolerance: list[float] = [0.0]


@contextmanager
def loosened(rtol: float) -> Iterator[None]:
    """Step solves by Krylov methods inside the block end at this relative residual, or at a looser one of the user's.

    For inexact products: V. Simoncini and D. B. Szyld, Theory of inexact Krylov subspace methods, 2003. Factors do not
    become less exact. Blocks nest; the innermost counts.

    Args:
        rtol: |b - A x| / |b|.
    """
    _tolerance.append(rtol)
    try:
        yield
    finally:
        _tolerance.pop()


@contextmanager
def keeping_few(prefix: str, is_asked: bool) -> Iterator[None]:
    """Inside, flexible conjugate gradients of this prefix keep two directions, unless options say otherwise.

    Products that are a little inexact need no more (full orthogonalization gains nothing), and vectors over all steps
    are large: PETSc keeps 30, and asks for the memory of 10 at once.
    """
    with defaults({prefix + "ksp_fcg_mmax": "2", prefix + "ksp_fcg_nprealloc": "1"} if is_asked else {}):
        yield


class StepCounter:
    """Iterations of all step solves by Krylov methods since the program began, on this rank.

    Attributes:
        solves, iterations: with a matrix or its transpose.
    """

    solves = 0
    iterations = 0


def multigrid() -> str:
    """The better multigrid that this PETSc has."""
    return "hypre" if PETSc.Sys.hasExternalPackage("hypre") else "gamg"


def factors() -> str:
    """What stands for exact solves over several ranks: factors of MUMPS, multigrid where this PETSc lacks it."""
    return "lu" if PETSc.Sys.hasExternalPackage("mumps") else multigrid()


class MatrixSolver:
    """Solves with one PETSc matrix, or with its transpose, for many right-hand sides. Collective.

    A symmetric matrix with a positive diagonal is solved by conjugate gradients, another by GMRES, both until the true
    residual is small. Its transpose is itself; that of another matrix is made, and set up, when first asked for.
    With `-step_pc_type lu` MUMPS factors the matrix once, and solves with it and its transpose.

    Args:
        A: assembled, of type AIJ, on any communicator.
        row: of the batch whose matrix this is, which failures name; None where all steps share it.
        pc_type: of the preconditioner; default `-step_pc_type`, where auto is multigrid.

    Raises:
        InputError: this PETSc lacks what the options ask for.

    Example:
        >>> solver = MatrixSolver(A)  # of all steps, each rank with n_owned unknowns
        >>> x = solver.solve(rows)  # (batch, n_owned)
    """

    def __init__(self, A: PETSc.Mat, row: int | None = None, pc_type: str | None = None) -> None:
        chosen = pc_type or read(StepSettings).pc_type
        self._A, self._row, self._pc_type = A, row, multigrid() if chosen == "auto" else chosen
        _require_available(self._pc_type, A)
        self._solvers = dict[bool, PETSc.KSP]()

    def solve(self, rows: Array, transpose: bool = False) -> Array:
        """The inverse (or its transpose) applied to rows.

        Args:
            rows: right-hand sides of this rank's unknowns, (batch, n_owned).

        Returns:
            the same shape.

        Raises:
            StepFailure: a matrix that is singular or not finite, or a solve that does not converge.
        """
        right = np.ascontiguousarray(rows, dtype=float)
        transpose = transpose and not self.is_symmetric
        try:
            return self._directly(right, transpose) if self._pc_type == "lu" else self._iteratively(right, transpose)
        except PETSc.Error as error:
            raise StepFailure(f"PETSc ended a step solve with error {error.ierr}", REMEDY, self._row) from None

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether a product with a vector equals that with the transpose. Collective."""
        x, y = self._A.createVecs()
        begin, end = x.getOwnershipRange()
        x.setArray(1 + np.cos(np.arange(begin, end, dtype=float) ** 2))
        z = y.duplicate()
        self._A.mult(x, y)
        self._A.multTranspose(x, z)
        size = y.norm(PETSc.NormType.NORM_INFINITY)
        z.axpy(-1.0, y)
        return bool(z.norm(PETSc.NormType.NORM_INFINITY) <= SYMMETRIC * size)

    # -- iterations ---------------------------------------------------------------------------------------------

    def _iteratively(self, right: Array, transpose: bool) -> Array:
        solver = self._solver(transpose)
        solver.setTolerances(rtol=max(self._rtol, _tolerance[-1]))
        left = np.empty_like(right)
        x, b = solver.getOperators()[0].createVecs()
        for known, found in zip(right, left):
            b.placeArray(known)
            x.placeArray(found)
            solver.solve(b, x)
            x.resetArray()
            b.resetArray()
            self._count(solver)
        x.destroy()
        b.destroy()
        return left

    def _count(self, solver: PETSc.KSP) -> None:
        StepCounter.solves += 1
        StepCounter.iterations += solver.getIterationNumber()
        reason = solver.getConvergedReason()
        if reason < 0:
            its, residual = solver.getIterationNumber(), solver.getResidualNorm()
            what = f"a step solve stopped after {its} iterations, reason {_word(reason)}, residual {residual:.1e}"
            raise StepFailure(what, REMEDY, self._row)

    def _solver(self, transpose: bool) -> PETSc.KSP:
        if transpose not in self._solvers:
            matrix = self._A.transpose(PETSc.Mat()) if transpose else self._A
            self._solvers[transpose] = self._set_up(matrix)
        return self._solvers[transpose]

    def _set_up(self, matrix: PETSc.Mat) -> PETSc.KSP:
        solver = PETSc.KSP().create(matrix.getComm())
        solver.setOptionsPrefix("step_")
        solver.setOperators(matrix)
        solver.setType("cg" if self.is_symmetric and matrix.getDiagonal().min()[1] > 0 else "gmres")
        solver.setTolerances(rtol=RTOL)
        solver.getPC().setType(self._pc_type)
        if not PETSc.Options().hasName("step_ksp_type"):  # others may have no such norm
            solver.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
            if solver.getType() == "gmres":
                solver.setPCSide(PETSc.PC.Side.RIGHT)
        with _chosen(self._pc_type):
            solver.setFromOptions()
        self._rtol = solver.getTolerances()[0]
        solver.setUp()
        return solver

    # -- factors ------------------------------------------------------------------------------------------------

    def _directly(self, right: Array, transpose: bool) -> Array:
        factor, left = self._factor, np.empty_like(right)
        (n, N), K = self._A.getSizes()[0], len(right)
        wide = [
            PETSc.Mat().createDense(((n, N), (None, K)), array=rows.T, comm=self._A.getComm()) for rows in (right, left)
        ]
        for matrix in wide:
            matrix.assemble()
        factor.setMumpsIcntl(9, 0 if transpose else 1)  # A'x = b instead of A x = b
        factor.matSolve(*wide)
        for matrix in wide:
            matrix.destroy()
        return left

    @cached_property
    def _factor(self) -> PETSc.Mat:
        pc = PETSc.PC().create(self._A.getComm())
        pc.setOptionsPrefix("step_")
        pc.setOperators(self._A)
        pc.setType("lu")
        pc.setFactorSolverType("mumps")
        with _chosen(self._pc_type):
            pc.setFromOptions()
        pc.setUp()
        factor = pc.getFactorMatrix()
        if factor.getMumpsInfog(1) < 0:
            what = f"MUMPS could not factor a step matrix dF/du_new, INFOG(1) = {factor.getMumpsInfog(1)}"
            raise StepFailure(what, "check that each step has a unique solution, and its memory", self._row)
        return factor


@contextmanager
def _chosen(pc_type: str) -> Iterator[None]:
    """Inside, PETSc reads this `-step_pc_type`: it does not know auto."""
    options = PETSc.Options()
    given = options.getString("step_pc_type") if options.hasName("step_pc_type") else None
    options.setValue("step_pc_type", pc_type)
    try:
        yield
    finally:
        if given is None:
            options.delValue("step_pc_type")
        else:
            options.setValue("step_pc_type", given)


def _require_available(pc_type: str, A: PETSc.Mat) -> None:
    """Raise `InputError` where this PETSc lacks a preconditioner."""
    package = {"hypre": "hypre", "lu": "mumps"}.get(pc_type)
    if package and not PETSc.Sys.hasExternalPackage(package):
        others = [each for each in ("lu", "hypre") if each != pc_type]
        there = [each for each in others if PETSc.Sys.hasExternalPackage({"lu": "mumps"}.get(each, each))]
        got = f"{pc_type}, for which this PETSc lacks {package}, on {A.getComm().getSize()} ranks"
        raise InputError("-step_pc_type", got, " | ".join([*there, "gamg", "bjacobi"]))


def _word(reason: int) -> str:
    """PETSc's name of a reason of KSP."""
    names = {value: name for name, value in vars(PETSc.KSP.ConvergedReason).items() if not name.startswith("_")}
    return f"{names.get(reason, 'unknown')} ({reason})"
