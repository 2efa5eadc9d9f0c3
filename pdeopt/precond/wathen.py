"""Block factorization of a KKT operator with an approximate Schur complement, as a PETSc Python PC.

    [W F'; F 0]^-1 = [I -W^-1 F'; 0 I] [W^-1 0; 0 -S^-1] [I 0; -F W^-1 I],   S = F W^-1 F'

How S is approximated is said in `schur.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import assign
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, read, read_inner, setting
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.levels import TimeMultigridSettings
from pdeopt.precond.operator import SchurOperator, blocks_of, is_whole, leave, operator_of
from pdeopt.precond.schur import ExactSchur, PropagatedSchur, use_schur_multigrid
from pdeopt.steps.linear_mgrit import LinearMgritSettings
from pdeopt.steps.matrices.krylov import StepSettings, keeping_few
from pdeopt.steps.stepsolve import is_krylov


@dataclass(frozen=True)
class WathenSettings(Settings, prefix="wathen_", includes=(StepSettings,)):
    """Block factorization of the KKT system with an approximate Schur complement.

    A PC's own prefix may stand before the options.
    """

    schur: str = setting(
        "matched",
        "approximation of the Schur complement of the KKT system; matched is as good for all numbers of steps and all "
        "regularizations",
        choices=("new_state", "old_new", "matched", "exact"),
    )
    propagator: str = setting(
        "auto",
        "how the state Jacobian in the Schur complement is inverted: in windows of steps, step after step (forward), "
        "or by MGRIT; multigrid works on the complement itself; auto is forward on one rank and for waves, which "
        "coarse steps do not carry, else MGRIT",
        choices=("auto", "window", "forward", "mgrit", "multigrid"),
        reads={
            "auto": (LinearMgritSettings,),
            "window": (LinearMgritSettings,),
            "mgrit": (LinearMgritSettings,),
            "multigrid": (TimeMultigridSettings,),
        },
    )


#: Iterations of GMRES on a matched Schur complement: its condition is 2, so four leave a hundredth, and the outer
#: method, whose vectors are three times as long, has few iterations.
SCHUR_ITERATIONS = 4

#: Conjugate gradients, where blocks are all of W, so that one application solves the system: at a condition of 2 they
#: leave 1e-15.
WHOLE_ITERATIONS = 20


#: Krylov methods that bear a preconditioner which changes from one application to the next.
FLEXIBLE = ("fgmres", "gcr", "fcg", "pipefgmres", "pipegcr", "pipefcg", "richardson", "preonly")

#: Inner methods that are linear in their right-hand side.
LINEAR = ("preonly", "richardson", "chebyshev")


class WathenPC(Preconditioner):
    """Block factorization of a KKT matrix with an approximate Schur complement.

    S is solved by a KSP of its own, `-{prefix}wathen_ksp_type`: four iterations of GMRES if matched, so that the outer
    method must be flexible, as `fgmres` is; where W misses nothing, as for linear equations, conjugate gradients to the
    tolerance of the KSP outside, which then has one iteration. With `preonly` there the preconditioner is linear and
    symmetric, but indefinite, as the matrix is.

        ksp.setOperators(operator.assemble())     # or operator.shell()
        ksp.setType("fgmres")
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(WathenPC())

    Attributes:
        settings: as they are read.
        blocks: of the present matrix; None on a rank without steps.
        propagator: that of the settings, or what `auto` stands for with these blocks.
        schur_solver: the KSP of S; None on a rank without steps.
        is_solver: whether one application solves the system, so that the method outside needs no iterations: blocks are
            all of W, and conjugate gradients on S have not failed since the last update.

    Raises:
        InputError: of a solve, where its Krylov method is not flexible and this preconditioner not linear.
    """

    reads = (WathenSettings,)
    blocks: KKTBlocks | None = None
    propagator = ""
    is_solver, _rtol, _solves_alone = False, 1e-2, False
    schur_solver: PETSc.KSP | None = None

    def initialize(self, pc: PETSc.PC) -> None:
        super().initialize(pc)
        self.settings = read_inner(WathenSettings, self.prefix)
        self._inner_prefix = self.prefix + WathenSettings.prefix
        self._mgrit, self._multigrid = LinearMgritSettings(), TimeMultigridSettings()
        if self.settings.propagator in ("auto", "window", "mgrit"):
            self._mgrit = read(LinearMgritSettings)
        elif self.settings.propagator == "multigrid":
            self._multigrid = read_inner(TimeMultigridSettings, self._inner_prefix)

    def update(self, pc: PETSc.PC) -> None:
        matrix = pc.getOperators()[1]
        self.blocks, self.schur_solver, self.is_solver = blocks_of(matrix), None, False
        if self.blocks is None:
            return  # a rank without steps on this level waits for the others only
        self.propagator = self._resolve(self.blocks)
        S, ksp = SchurOperator(self.blocks).shell(), PETSc.KSP().create(self.blocks.grid.comm)
        self.own(S.destroy, ksp.destroy)
        ksp.setOptionsPrefix(self._inner_prefix)
        ksp.setOperators(S)
        self._solves_alone = self.settings.schur == "matched" and is_whole(matrix, self.blocks)
        self._iterate(ksp, self.blocks)
        self._approximate(ksp.getPC(), matrix)
        with keeping_few(self._inner_prefix, ksp.getType() == "fcg"):
            ksp.setFromOptions()
        if ksp.getNormType() == PETSc.KSP.NormType.NONE:  # else GMRES ends by a residual that nobody reads
            ksp.setConvergenceTest(_after_all_iterations)
        context = ksp.getPC().getPythonContext() if ksp.getPC().getType() == "python" else None
        if isinstance(context, PropagatedSchur):
            context.is_loose = ksp.getType() in FLEXIBLE and ksp.getType() not in LINEAR
        ksp.setUp()  # now, where a failure reaches all ranks
        self.schur_solver, self.is_solver = ksp, self._solves_alone
        self._right, self._left = S.createVecs()

    def _resolve(self, blocks: KKTBlocks) -> str:
        if self.settings.propagator != "auto":
            return self.settings.propagator
        return "forward" if blocks.conservative or blocks.grid.time.size == 1 else "mgrit"

    def _iterate(self, ksp: PETSc.KSP, blocks: KKTBlocks) -> None:
        """The Krylov method on S, unless the options say otherwise."""
        if self._solves_alone:
            ksp.setType("fcg" if is_krylov(blocks.A) else "cg")  # inexact step solves ask for flexible ones
            ksp.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
            ksp.setTolerances(max_it=WHOLE_ITERATIONS)
        elif self.settings.schur == "matched" and blocks.is_exact:
            ksp.setType("fgmres")  # PETSc's CG would apply the preconditioner once more than it uses
            ksp.setGMRESRestart(SCHUR_ITERATIONS)
            ksp.setNormType(PETSc.KSP.NormType.NONE)
            ksp.setTolerances(max_it=SCHUR_ITERATIONS)
        else:
            ksp.setType("preonly")

    def _approximate(self, inner: PETSc.PC, matrix: PETSc.Mat) -> None:
        """Make `inner` an approximate inverse of S."""
        if self.settings.schur == "exact":
            context: Preconditioner = ExactSchur(operator_of(matrix))
        elif self.propagator == "multigrid":
            self.own(*(coarse.destroy for coarse in use_schur_multigrid(inner, self._multigrid)))
            return
        else:
            context = PropagatedSchur(self.settings.schur, self.propagator, self._mgrit)
        inner.setType("python")
        inner.setPythonContext(context)

    def preSolve(self, pc: PETSc.PC, ksp: PETSc.KSP, right: PETSc.Vec, left: PETSc.Vec) -> None:
        """Take its tolerance. Refuse Krylov methods that take a preconditioner for one matrix: GMRES ends with a small
        residual of its own and a wrong solution. PETSc calls it before a solve."""
        inner, self._rtol = self.schur_solver, ksp.getTolerances()[0]
        if inner is None or inner.getType() in LINEAR or ksp.getType() in FLEXIBLE:
            return
        raise InputError(
            f"KSP of type {ksp.getType()} with WathenPC",
            f"a preconditioner that changes from one application to the next, as {inner.getType()} solves inside it",
            f"{' | '.join(FLEXIBLE)}; or -{self._inner_prefix}ksp_type preonly, which makes it linear",
        )

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        blocks = self.blocks
        if blocks is None or self.schur_solver is None:
            return leave(y)
        assign(self._right, self._residual(blocks, x))
        if self._solves_alone:
            self.schur_solver.setTolerances(atol=0.5 * self._rtol * x.norm())
        self.schur_solver.solve(self._right, self._left)
        if self.schur_solver.getConvergedReason() < 0:
            self.schur_solver.setTolerances(max_it=SCHUR_ITERATIONS)  # it does not fit: no more work than for others
            self.is_solver = False
        lam = blocks.layout.rows(self._left)
        (u, z, p), _ = blocks.layout.kkt_fields(x)
        v, w, q = blocks.adjoint(lam)
        blocks.layout.pack(y, *blocks.inverse((u.sub_(v), z.sub_(w), p - q)), lam)

    def _residual(self, blocks: KKTBlocks, x: PETSc.Vec) -> Tensor:
        """F W^-1 g - c of x = [g | c]; nothing else stays in memory while S is solved."""
        g, c = blocks.layout.kkt_fields(x)
        return blocks.jacobian(blocks.inverse(g)).sub_(c)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        self.tell(pc, viewer, "block factorization, whose Schur complement is solved by")
        self.view_inner(pc, viewer, self.schur_solver)


def _after_all_iterations(ksp: PETSc.KSP, iterations: int, residual: float) -> PETSc.KSP.ConvergedReason | int:
    """The test of a KSP that measures no residual."""
    return PETSc.KSP.ConvergedReason.CONVERGED_ITS if iterations >= ksp.max_it else 0
