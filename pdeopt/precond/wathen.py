"""Block factorization of a KKT operator with an approximate Schur complement, as a PETSc Python PC.

    [W F'; F 0]^-1 = [I -W^-1 F'; 0 I] [W^-1 0; 0 -S^-1] [I 0; -F W^-1 I],   S = F W^-1 F'

S = T W^-1 T' + C Wzz^-1 C', where T is the state Jacobian over all steps, is approximated by

- new_state: A W^-1 A', step by step; what couples the steps is dropped;
- old_new: T W^-1 T' (M. Stoll, A. J. Wathen, All-at-once solution of time-dependent PDE-constrained optimization
  problems, 2010);
- matched: (T + N) W^-1 (T + N)' with N W^-1 N' = C Wzz^-1 C'; the eigenvalues of the preconditioned S lie in [1/2, 1]
  whatever the mesh, the steps and the regularization (Pearson, Stoll, Wathen 2012);
- exact: S itself, by factors of the KKT matrix, the oracle.

T + N is inverted as `propagator` says, serially or in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import together
from pdeopt.core.settings import Settings, read, read_inner, setting
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.direct import factor_kkt
from pdeopt.precond.operator import SchurOperator, blocks_of, leave, operator_of
from pdeopt.steps.linear_mgrit import LinearMgrit, LinearMgritSettings, TimeSystem
from pdeopt.steps.sparse import combination
from pdeopt.steps.stepsolve import StepSettings


@dataclass(frozen=True)
class WathenSettings(Settings, prefix="wathen_", includes=(LinearMgritSettings, StepSettings)):
    """Block factorization with an approximate Schur complement (wathen).

    A PC's own prefix may stand before the options.
    """

    schur: str = setting(
        "matched", "approximation of the Schur complement", choices=("new_state", "old_new", "matched", "exact")
    )
    propagator: str = setting(
        "auto",
        "inverse of the state Jacobian in it: windows alone, serial, MGRIT, or multigrid on the complement; "
        "auto is serial for waves, which coarse steps do not carry, and for unlike steps on one rank, else MGRIT",
        choices=("auto", "window", "forward", "mgrit", "multigrid"),
    )


#: Steps of GMRES on a matched Schur complement: its condition is 2, so four leave a hundredth, and the outer method,
#: whose vectors are three times as long, has few iterations.
INNER = 4


class WathenPC:
    """The preconditioner; S is solved by a KSP of its own, `-{prefix}wathen_ksp_type`: four steps of GMRES if matched.

    With `preonly` there the preconditioner is linear and symmetric, so that MINRES may use it; with a tolerance,
    and W exact, one application solves the KKT system.
    """

    _ksp: PETSc.KSP | None = None

    def setUp(self, pc: PETSc.PC) -> None:
        matrix = pc.getOperators()[1]
        prefix = pc.getOptionsPrefix() or ""
        blocks = blocks_of(matrix)
        self._free()  # a rank without steps on this level waits for the others only
        together(pc.getComm().tompi4py(), lambda: None if blocks is None else self._factorize(blocks, matrix, prefix))

    def _factorize(self, blocks: KKTBlocks, matrix: PETSc.Mat, prefix: str) -> None:
        self.blocks = blocks
        self.settings = resolve(read_inner(WathenSettings, prefix), blocks)
        self._ksp = PETSc.KSP().create(self.blocks.grid.comm)
        self._ksp.setOptionsPrefix(prefix + WathenSettings.prefix)
        self._ksp.setOperators(SchurOperator(self.blocks).shell())
        if (
            self.settings.schur == "matched" and blocks.is_exact
        ):  # PETSc's CG would apply its preconditioner once more, in vain
            self._ksp.setType("fgmres")  # PETSc's CG would apply its preconditioner once more, in vain
            self._ksp.setGMRESRestart(INNER)
            self._ksp.setNormType(PETSc.KSP.NormType.NONE)
            self._ksp.setTolerances(max_it=INNER)
        else:
            self._ksp.setType("preonly")
        self._approximate(self._ksp.getPC(), matrix)
        self._ksp.setFromOptions()
        if self._ksp.getNormType() == PETSc.KSP.NormType.NONE:  # else GMRES ends by a residual that nobody reads
            self._ksp.setConvergenceTest(_after_all_iterations)
        self._right, self._left = self._ksp.getOperators()[0].createVecs()

    def _approximate(self, inner: PETSc.PC, matrix: PETSc.Mat) -> None:
        """Make `inner` an approximate inverse of S."""
        if self.settings.schur == "exact":
            context: Any = ExactSchur(operator_of(matrix))
        elif self.settings.propagator == "multigrid":
            from pdeopt.precond.timemg import SchurMultigrid

            SchurMultigrid(self.blocks).configure(inner)
            return
        else:
            context = PropagatedSchur(self.blocks, self.settings)
        inner.setType("python")
        inner.setPythonContext(context)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        if self._ksp is None:
            return leave(y)
        blocks = self.blocks
        assign(self._right, self._residual(x))
        self._ksp.solve(self._right, self._left)
        lam = copy(self._left).reshape(-1, blocks.n)
        (u, z, p), _ = blocks.fields(x)
        v, w, q = blocks.adjoint(lam)
        blocks.pack(y, blocks.inverse((u.sub_(v), z.sub_(w), p - q)), lam)

    def _residual(self, x: PETSc.Vec) -> Tensor:
        """F W^-1 g - c of x = [g | c]; nothing else stays in memory while S is solved."""
        g, c = self.blocks.fields(x)
        return self.blocks.jacobian(self.blocks.inverse(g)).sub_(c)

    applyTranspose = apply  # symmetric, as its parts are

    @property
    def schur_iterations(self) -> int:
        """Krylov iterations with S in the last application."""
        return 0 if self._ksp is None else int(self._ksp.getIterationNumber())

    def destroy(self, pc: PETSc.PC) -> None:
        self._free()

    def _free(self) -> None:
        if self._ksp is not None:
            self._ksp.getOperators()[0].destroy()
            self._ksp.destroy()
        self._ksp = None


def _after_all_iterations(ksp: PETSc.KSP, iterations: int, residual: float) -> PETSc.KSP.ConvergedReason | int:
    """The test of a KSP that measures no residual."""
    return PETSc.KSP.ConvergedReason.CONVERGED_ITS if iterations >= ksp.max_it else 0


def resolve(settings: WathenSettings, blocks: KKTBlocks) -> WathenSettings:
    """The settings with the propagator that `auto` stands for."""
    if settings.propagator != "auto":
        return settings
    serial = blocks.conservative or (blocks.grid.mpi.size == 1 and not blocks.A.is_constant)
    return replace(settings, propagator="forward" if serial else "mgrit")


class PropagatedSchur:
    """((T + N) W^-1 (T + N)')^-1 = (T + N)^-T W (T + N)^-1, or the same without N."""

    def __init__(self, blocks: KKTBlocks, settings: WathenSettings) -> None:
        grid, A, B = blocks.grid, blocks.A, blocks.B
        if settings.schur == "matched":
            N = blocks.shift()
            part = 0.5 if blocks.conservative else 1.0
            A = combination([(1.0, A), (part, N)])
            B = combination([(1.0, B), (1.0 - part, N)]) if blocks.conservative else B
        self.blocks, mgrit = blocks, read(LinearMgritSettings)
        if settings.schur == "new_state":
            system = TimeSystem(grid, A, B, window=1).factor()
            self._forward, self._adjoint = system.sweep, system.sweep_adjoint
        elif settings.propagator == "mgrit" and blocks.window is None:
            cycles = LinearMgrit(grid, A, B, mgrit)
            self._forward, self._adjoint = cycles.forward, cycles.adjoint
        else:
            window = blocks.window or (mgrit.window if settings.propagator == "window" else None)
            system = TimeSystem(grid, A, B, window).factor()
            self._forward, self._adjoint = system.sweep, system.sweep_adjoint

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        r = copy(x).reshape(-1, self.blocks.n)
        assign(y, self._adjoint(self.blocks.state.multiply(self._forward(r))))

    applyTranspose = apply


class ExactSchur:
    """S^-1 r = lam with [W F'; F 0] (x, lam) = (0, -r), by factors of that matrix."""

    def __init__(self, operator: KKTOperator) -> None:
        self.operator = KKTOperator(operator.metric, "metric" if operator.hessian == "metric" else "gauss-newton")
        self.operator.set_point(operator.lin, fixed=operator.fixed)
        self._ksp = factor_kkt(self.operator)
        self._right, self._left = self.operator.problem.create_kkt(), self.operator.problem.create_kkt()

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        problem = self.operator.problem
        problem.layout.join_kkt(problem.create_primal(), x, self._right)
        self._right.scale(-1.0)
        self._ksp.solve(self._right, self._left)
        problem.layout.split_kkt(self._left, problem.create_primal(), y)

    applyTranspose = apply

    def destroy(self, pc: PETSc.PC) -> None:
        self._ksp.destroy()
        self.operator.free()
