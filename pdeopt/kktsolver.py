"""Solving with a KKT operator by PETSc, to a tolerance in the problem's own norms.

Default: MUMPS' symmetric indefinite factorisation of the assembled matrix, and where PETSc has no MUMPS
its own LU of the permuted matrix (`precond/direct.py`). Anything else by options of the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

from petsc4py import PETSc

from pdeopt.errors import SolveFailure
from pdeopt.kkt import Hessian, KKTOperator
from pdeopt.layout import KKTLayout
from pdeopt.metric import RieszMetric
from pdeopt.monitor import logged
from pdeopt.options import read, set_default, setting
from pdeopt.precond.direct import KKTDirectPC
from pdeopt.problem import Linearization

#: Corrections after a solve whose residual, in the problem's norms, is still above the tolerance.
MAX_REFINEMENTS = 5

#: INFOG(1) of MUMPS where pivots need more memory than its analysis foresaw.
MUMPS_OUT_OF_ROOM = (-8, -9, -11, -14, -15, -17, -19, -20)


@dataclass(frozen=True)
class KKTSettings:
    """Options of the prefix beside those of KSP and PC."""

    mat_type: str = setting("aij", "form of the operator", choices=("aij", "shell"))


class KKTSolver:
    """K s = r for one KKT operator that moves from point to point.

    Args:
        metric: Riesz metric of the problem.
        hessian: which K; see `KKTOperator`.
        prefix: of the options, `-{prefix}ksp_type`, `-{prefix}pc_type`, ...
    """

    def __init__(self, metric: RieszMetric, hessian: Hessian, prefix: str) -> None:
        self.metric, self.problem, self.prefix = metric, metric.problem, prefix
        self.operator = KKTOperator(metric, hessian)
        has_pattern = self.problem.constraint.pattern is not None
        self.settings = read(KKTSettings, prefix, mat_type="aij" if has_pattern else "shell")
        self._matrix: PETSc.Mat | None = None
        self._ksp = self._create_ksp()
        self.iterations = 0

    def _create_ksp(self) -> PETSc.KSP:
        ksp = PETSc.KSP().create(self.problem.grid.comm)
        ksp.setOptionsPrefix(self.prefix)
        if self.settings.mat_type == "shell":
            ksp.setType("gmres")
            ksp.getPC().setType("none")
        else:
            ksp.setType("preonly")
            use_direct(ksp.getPC(), self.operator.layout)
        ksp.setFromOptions()
        if ksp.getPC().getType() == "fieldsplit":
            kind = PETSc.Options(self.prefix).getString("pc_fieldsplit_type", "")
            ksp.getPC().setFieldSplitIS(*self.operator.layout.index_sets(two=kind == "schur").items())
        return ksp

    @logged("pdeoptKKTSetUp")
    def set_point(self, lin: Linearization, lam: PETSc.Vec | None = None) -> None:
        """Move to a linearisation; factors are renewed at the next solve."""
        self.operator.set_point(lin, lam)
        if self.settings.mat_type == "aij":
            self._matrix = self.operator.assemble()
        else:
            self._matrix = self._matrix or self.operator.shell()
            self._matrix.stateIncrease()  # tells PETSc that it changed
        self._ksp.setOperators(self._matrix)

    @logged("pdeoptKKTSolve")
    def solve(self, rhs: PETSc.Vec, rtol: float) -> PETSc.Vec:
        """s with |r - K s| <= rtol |r| in the dual norms of the problem; a new vector.

        Raises:
            SolveFailure: a singular or not finite matrix, or the tolerance is out of reach.
        """
        assert self._matrix is not None, "set_point comes first"
        target = rtol * self.norm(rhs)
        solution, remainder, correction = rhs.duplicate(), rhs.copy(), rhs.duplicate()
        solution.set(0.0)
        size = self.norm(remainder)
        for _ in range(1 + MAX_REFINEMENTS):
            if size == 0.0:
                return solution
            self._ksp.setTolerances(rtol=min(0.1, 0.5 * target / size))
            self._solve_with_room(remainder, correction)
            self.iterations += self._ksp.getIterationNumber()
            solution.axpy(1.0, correction)
            self._matrix.mult(solution, remainder)
            remainder.aypx(-1.0, rhs)
            last, size = size, self.norm(remainder)
            if size <= target:
                return solution
            if not size < 0.9 * last:
                break
        if size <= 1e-6 * self.norm(rhs):  # rounding of an ill-conditioned factorisation: as good as it gets
            return solution
        raise SolveFailure(
            f"KKT system: relative residual {size / self.norm(rhs):.1e} where {rtol:.1e} was asked for "
            f"(KSP reason {self._ksp.getConvergedReason()})",
            f"see -{self.prefix}ksp_converged_reason; the default is a direct solver",
        )

    def solve_blocks(self, g: PETSc.Vec, c: PETSc.Vec, rtol: float) -> tuple[PETSc.Vec, PETSc.Vec]:
        """The primal and the multiplier part of K s = [g | c]; see `solve`."""
        solution = self.solve(self.problem.join_kkt(g, c, self.problem.create_kkt()), rtol)
        x, lam = self.problem.create_primal(), self.problem.create_multiplier()
        self.problem.split_kkt(solution, x, lam)
        return x, lam

    def _solve_with_room(self, rhs: PETSc.Vec, out: PETSc.Vec) -> None:
        """Solve; where MUMPS ran out of workspace, with more of it."""
        for _ in range(6):
            self._ksp.solve(rhs, out)
            pc = self._ksp.getPC()
            if pc.getType() not in ("lu", "cholesky") or pc.getFactorSolverType() != "mumps":
                return
            factor = pc.getFactorMatrix()
            if factor.getMumpsInfog(1) not in MUMPS_OUT_OF_ROOM:
                return
            room = 2 * max(factor.getMumpsIcntl(14), 50)
            PETSc.Options(self.prefix).setValue("mat_mumps_icntl_14", str(room))
            self._ksp.reset()  # MUMPS does not recover from this error: it begins anew
            self._ksp.setOperators(self._matrix)

    def norm(self, k: PETSc.Vec) -> float:
        """The dual norm of a right-hand side or residual [g | c]."""
        g, c = self.problem.create_primal(), self.problem.create_multiplier()
        self.problem.split_kkt(k, g, c)
        return float((self.metric.dual_norm(g) ** 2 + self.metric.residual_norm(c) ** 2) ** 0.5)

    def take_iterations(self) -> int:
        """Krylov iterations since the last call."""
        taken, self.iterations = self.iterations, 0
        return taken

    def destroy(self) -> None:
        """Free matrix, factors and solver."""
        self._ksp.destroy()
        if self.settings.mat_type == "shell" and self._matrix is not None:
            self._matrix.destroy()
        self.operator.free()


def use_direct(pc: PETSc.PC, layout: KKTLayout) -> None:
    """The best factorisation for KKT matrices that this PETSc has."""
    if PETSc.Sys.hasExternalPackage("mumps"):
        pc.setType("cholesky")
        pc.setFactorSolverType("mumps")
        prefix = pc.getOptionsPrefix()  # MUMPS reads no other place before its analysis
        set_default(f"{prefix}mat_mumps_icntl_7", "6")  # QAMD: quick, and parameters make dense rows
        set_default(f"{prefix}mat_mumps_icntl_14", "100")  # room for delayed pivots, in per cent
    else:
        pc.setType("python")
        pc.setPythonContext(KKTDirectPC(layout))
