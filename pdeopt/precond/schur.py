"""Approximate inverses of the Schur complement S = F W^-1 F' of a KKT matrix [W F'; F 0].

S = T W^-1 T' + C Wzz^-1 C', where T is the state Jacobian over all steps, is approximated by

- new_state: A W^-1 A', step by step; what couples the steps is dropped;
- old_new: T W^-1 T' (M. Stoll, A. J. Wathen, All-at-once solution of time-dependent PDE-constrained optimization
  problems, 2010);
- matched: (T + N) W^-1 (T + N)' with N W^-1 N' = C Wzz^-1 C', see `matching.py`;
- exact: S itself, by factors of the KKT matrix, the oracle.

T + N is inverted serially or in parallel, as the propagator says; or S is not approximated at all, but solved by
multigrid in time. All preconditioners here are for the matrix of a `SchurOperator`.
"""

from __future__ import annotations

from itertools import pairwise

from petsc4py import PETSc

from pdeopt.core.arrays import assign
from pdeopt.core.errors import InputError
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.direct import factor_kkt
from pdeopt.precond.levels import TimeMultigridSettings, fill_multigrid, hierarchy, transfer
from pdeopt.precond.matching import matched_shift
from pdeopt.precond.operator import SchurOperator, blocks_of, leave
from pdeopt.steps.linear_mgrit import LinearMgrit, LinearMgritSettings, TimeSystem
from pdeopt.steps.matrices.krylov import loosened
from pdeopt.steps.sparse import StepMatrix, combination
from pdeopt.steps.stepsolve import step_solver
from pdeopt.steps.transfer import adjoint_interpolation

#: What `PropagatedSchur` may be made of.
APPROXIMATIONS, PROPAGATORS = ("new_state", "old_new", "matched"), ("window", "forward", "mgrit")

#: Options of PCMG on Schur complements, unless the user says otherwise.
MULTIGRID_DEFAULTS = {
    "pc_mg_cycle_type": "w",
    "mg_levels_ksp_max_it": "2",
    "mg_levels_ksp_norm_type": "none",
    "mg_levels_ksp_richardson_scale": "1.3",
}

#: Relative residual of a step solve by a Krylov method inside a preconditioner, where the method outside is flexible.
LOOSE_STEPS = 1e-3

#: The coarsest problem of multigrid on Schur complements is solved by CG to this relative residual.
COARSEST_RTOL, COARSEST_ITERATIONS = 1e-10, 60


class PropagatedSchur(Preconditioner):
    """((T + N) W^-1 (T + N)')^-1 = (T + N)^-T W (T + N)^-1, or the same without N.

    Args:
        schur: `new_state`, `old_new` or `matched`, see above.
        propagator: how T + N is inverted: `window`, windows of steps, each alone; `forward`, one step after the other;
            or `mgrit`. Where the blocks are cut into windows, each window is solved serially, whatever is said here.
        mgrit: windows, cycles and levels.

    Attributes:
        is_loose: the method outside bears step solves by Krylov methods that are not exact.

    Raises:
        InputError: another approximation or propagator.
    """

    is_loose = False

    def __init__(
        self, schur: str = "matched", propagator: str = "forward", mgrit: LinearMgritSettings | None = None
    ) -> None:
        for what, got, legal in (("schur", schur, APPROXIMATIONS), ("propagator", propagator, PROPAGATORS)):
            if got not in legal:
                raise InputError(f"PropagatedSchur: {what}", repr(got), " | ".join(legal))
        self.schur, self.propagator, self.mgrit = schur, propagator, mgrit or LinearMgritSettings()
        self.blocks: KKTBlocks | None = None

    def update(self, pc: PETSc.PC) -> None:
        self.factor(blocks_of(pc.getOperators()[1]))

    def factor(self, blocks: KKTBlocks | None) -> None:
        """`update` without a PC. Collective.

        Args:
            blocks: of the steps; None on a rank without steps.

        Raises:
            SolveFailure: a step is singular or not finite.
        """
        self.blocks = blocks
        if blocks is None:
            return
        A, B = self._shifted(blocks)
        if self.schur != "new_state" and self.propagator == "mgrit" and blocks.window is None:
            cycles = LinearMgrit(blocks.grid, A, B, self.mgrit)
            self._forward, self._adjoint = cycles.forward, cycles.adjoint
        else:
            system = TimeSystem(blocks.grid, A, B, self._window(blocks)).factor()
            self._forward, self._adjoint = system.sweep, system.sweep_adjoint

    def _shifted(self, blocks: KKTBlocks) -> tuple[StepMatrix, StepMatrix]:
        """The blocks of T + N; steps that conserve energy take half of N at each of their ends."""
        if self.schur != "matched":
            return blocks.A, blocks.B
        N = matched_shift(blocks)
        if not blocks.conservative:
            return combination([(1.0, blocks.A), (1.0, N)]), blocks.B
        return combination([(1.0, blocks.A), (0.5, N)]), combination([(1.0, blocks.B), (0.5, N)])

    def _window(self, blocks: KKTBlocks) -> int | None:
        """Steps that are solved together; None for all."""
        if self.schur == "new_state":
            return 1
        return blocks.window or (self.mgrit.window if self.propagator == "window" else None)

    def apply(self, pc: PETSc.PC | None, x: PETSc.Vec, y: PETSc.Vec) -> None:
        if self.blocks is None:
            return leave(y)
        r = self.blocks.layout.rows(x)
        with loosened(LOOSE_STEPS if self.is_loose else 0.0):
            assign(y, self._adjoint(self.blocks.state.multiply(self._forward(r))))

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        self.tell(pc, viewer, self._description())

    def _description(self) -> str | None:
        if self.blocks is None:
            return None
        steps, window = self.blocks.grid.num_steps, self._window(self.blocks)
        lines = [f"Schur complement: {self.schur}"]
        if window is not None:
            lines += [f"propagator: window, {steps} steps in windows of {window}"]
        elif self.propagator == "mgrit":
            m = self.mgrit
            levels = [steps]
            while levels[-1] > m.window and len(levels) < m.levels:
                levels.append(-(-levels[-1] // m.window))
            lines += [f"propagator: mgrit, windows of {m.window} steps, cycles: {m.cycles}"]
            lines += [f"levels: {len(levels)}, of {', '.join(map(str, levels))} steps"]
        else:
            lines += [f"propagator: forward, {steps} steps one after the other"]
        return "\n".join(lines)


class ExactSchur(Preconditioner):
    """S^-1 r = lam with [W F'; F 0] (x, lam) = (0, -r), by factors of that matrix.

    Args:
        operator: the KKT operator whose Schur complement it is; a full Hessian is replaced by Gauss-Newton's.
    """

    def __init__(self, operator: KKTOperator) -> None:
        self._given, self.problem = operator, operator.problem
        self._right, self._left = self.problem.create_kkt(), self.problem.create_kkt()

    def update(self, pc: PETSc.PC) -> None:
        given = self._given
        operator = KKTOperator(given.metric, given.hessian if given.is_metric else "gauss-newton")
        operator.set_point(given.lin, fixed=given.fixed)
        self._ksp = factor_kkt(operator)
        self.own(operator.free, self._ksp.destroy)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self.problem.layout.join_kkt(self.problem.create_primal(), x, self._right)
        self._right.scale(-1.0)
        self._ksp.solve(self._right, self._left)
        self.problem.layout.split_kkt(self._left, self.problem.create_primal(), y)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        self.tell(pc, viewer, "Schur complement: exact, by factors of the KKT matrix")
        self.view_inner(pc, viewer, self._ksp)


class MatchedBlock(Preconditioner):
    """((A + N) W^-1 (A + N)')^-1 for each step, which smooths S.

    It is the diagonal block of S with *all* its terms, matched: N W^-1 N' = B W^-1 B' + C Wzz^-1 C'. Two solves a step,
    independent over the steps.
    """

    def update(self, pc: PETSc.PC) -> None:
        self.blocks = blocks_of(pc.getOperators()[1])
        if self.blocks is not None:
            N = matched_shift(self.blocks, with_old_state=True)
            self._solver = step_solver(combination([(1.0, self.blocks.A), (1.0, N)]))

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        if self.blocks is None:
            return leave(y)
        r = self._solver.solve(self.blocks.layout.rows(x))
        assign(y, self._solver.solve(self.blocks.state.multiply(r), transpose=True))

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        text = None
        if self.blocks is not None:
            text = f"Schur complement: matched diagonal blocks of {self.blocks.grid.num_steps} steps"
        self.tell(pc, viewer, text)


def use_schur_multigrid(pc: PETSc.PC, settings: TimeMultigridSettings) -> list[PETSc.Mat]:
    """Make `pc` multigrid in time on S, which is block tridiagonal and elliptic in time. Collective.

    A W-cycle is textbook multigrid: `MatchedBlock` smooths twice before and after. The coarsest problem is solved by
    CG with the matched approximation.

    Args:
        pc: with the matrix of a `SchurOperator`, which has steps on all ranks.
        settings: the levels.

    Returns:
        The matrices of the coarser levels; the caller destroys them with `pc`.
    """
    finest = pc.getOperators()[0]
    blocks = blocks_of(finest)
    assert blocks is not None  # all ranks have steps there
    if blocks.grid.space_ranks > 1:
        got = f"multigrid with {blocks.grid.space_ranks} ranks a step"
        raise InputError("wathen_propagator", got, " | ".join(PROPAGATORS))
    comm, levels = blocks.grid.comm, hierarchy(blocks, settings)
    fields = [(adjoint_interpolation, blocks.n)]
    transfers = [(transfer(*pair, comm, settings.coarsening, fields), None) for pair in pairwise(levels)]
    coarser = [SchurOperator(level.blocks, comm).shell() for level in levels[1:]]
    fill_multigrid(pc, [finest, *coarser], transfers, _smoother, _coarsest, MULTIGRID_DEFAULTS)
    return coarser


def _smoother(ksp: PETSc.KSP) -> None:
    ksp.setType("richardson")
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(MatchedBlock())


def _coarsest(ksp: PETSc.KSP) -> None:
    ksp.setType("cg")
    ksp.setTolerances(rtol=COARSEST_RTOL, max_it=COARSEST_ITERATIONS)
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(PropagatedSchur("matched", "forward"))
