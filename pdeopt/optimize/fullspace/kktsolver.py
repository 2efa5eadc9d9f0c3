"""Solving with a KKT operator by PETSc, to a tolerance in the problem's own norms.

`-{prefix}precond` chooses between factors of the assembled matrix (`precond/direct.py`), conjugate gradients on the
reduced Hessian (`precond/reduced.py`) and flexible GMRES with one of the other preconditioners of `precond/`; any other
solver of PETSc by `-{prefix}ksp_type` and `-{prefix}pc_type`.
`-{prefix}form coupled` solves the system with explicit continuity between windows of steps (`coupled.py`) instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric, dual_length
from pdeopt.core.arrays import free_garbage
from pdeopt.core.errors import InputError, SolveFailure, as_raised
from pdeopt.core.monitor import logged
from pdeopt.core.options import defaults
from pdeopt.core.ranks import freed
from pdeopt.core.settings import read_inner
from pdeopt.kkt.blocks import sees_all_states
from pdeopt.kkt.coupled import CoupledKKT
from pdeopt.kkt.operator import Hessian, KKTOperator
from pdeopt.kkt.refinement import Refinement
from pdeopt.optimize.fullspace.kktchoice import PRECONDITIONERS, Choice, KKTSettings, stages
from pdeopt.precond.direct import use_direct
from pdeopt.precond.reduced import ReducedPC
from pdeopt.precond.wathen import WathenPC

#: Corrections after a solve whose residual, in the problem's norms, is still above the tolerance.
MAX_REFINEMENTS = 5

#: A relative residual that the rounding of an ill-conditioned factorization may leave: as good as it gets.
ROUNDING_RTOL = 1e-6

#: Zero, as a divisor.
TINY = 1e-300

#: INFOG(1) of MUMPS where pivots need more memory than its analysis foresaw.
MUMPS_OUT_OF_ROOM = (-8, -9, -11, -14, -15, -17, -19, -20)

#: Krylov iterations of a solve, and those whose vectors are kept, two of all unknowns each, ten taken at a time;
#: "wathen" takes a few iterations where it fits, and keeps its counts with few of them.
MAX_ITERATIONS, RESTART, FLAT_RESTART = 500, 100, 30


class KKTSolver:
    """K s = r for one KKT operator that moves from point to point.

    Args:
        metric: Riesz metric of the problem.
        hessian: which K; see `KKTOperator`.
        outer: prefix of the options, `-{outer}kkt_ksp_type`, `-{outer}kkt_pc_type`, ...
        precond: default of `-{outer}kkt_precond` where the steps have a sparsity pattern; "reduced" where not.
        given: settings of `KKTSettings` that come before these defaults; options win.

    Attributes:
        choice: the ways to solve in turn, of which there are several for "auto" alone.
        way: the present one.
        curves_down: whether the last solve met a direction along which the Hessian is not positive, see `solve`.

    Raises:
        InputError: a setting that is not legal.
    """

    def __init__(
        self,
        metric: RieszMetric,
        hessian: Hessian,
        outer: str,
        precond: str = "auto",
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.metric, self.problem = metric, metric.problem
        self.outer, self.prefix, self._given = outer, outer + KKTSettings.prefix, dict(given or {})
        has_pattern = self.problem.constraint.pattern is not None
        petsc = PETSc.Options(self.prefix).hasName("pc_type")
        self.settings = self._read("none" if petsc else precond if has_pattern else "reduced")
        if self.settings.form == "coupled":
            self.settings = self._read("direct")
        self.choice = Choice(stages(self.problem, self.settings, hessian))
        self._coupled = self._create_coupled(hessian) if self.settings.form == "coupled" else None
        self.operator = self._coupled or KKTOperator(metric, hessian)
        self.way = self.choice.way
        self._matrix: PETSc.Mat | None = None
        self._ksp = self._create_ksp()
        self._is_factored = False
        self.iterations, self.curves_down = 0, False

    def _read(self, precond: str) -> KKTSettings:
        """From `-{outer}kkt_NAME`, else from `-kkt_NAME`."""
        return read_inner(KKTSettings, self.outer, **{"precond": precond} | self._given)

    @property
    def is_assembled(self) -> bool:
        """Whether K, which gives the residuals, has entries."""
        has_pattern = self.problem.constraint.pattern is not None
        wants_entries = self.way == "direct" or (has_pattern and self.way == "none")
        return self._coupled is None and {"auto": wants_entries, "aij": True, "shell": False}[self.settings.mat_type]

    def _create_coupled(self, hessian: Hessian) -> CoupledKKT:
        for name, legal in {"precond": ("direct", "none"), "mat_type": ("auto", "aij")}.items():
            if (value := getattr(self.settings, name)) not in legal:
                raise InputError(f"-{self.prefix}{name} of the coupled form", value, " | ".join(legal))
        return CoupledKKT(self.metric, hessian, self.settings.window)

    def _create_ksp(self) -> PETSc.KSP:
        ksp = PETSc.KSP().create(self.problem.grid.comm)
        ksp.setOptionsPrefix(self.prefix)
        ksp.setTolerances(max_it=MAX_ITERATIONS)
        context, layout = PRECONDITIONERS[self.way], self._coupled.coupled if self._coupled else self.operator.layout
        is_direct = self.way == "direct" and (self.is_assembled or self._coupled is not None)
        if context is not None:
            ksp.getPC().setType("python")
            ksp.getPC().setPythonContext(context())
        elif is_direct:
            use_direct(ksp.getPC(), layout)
        else:
            ksp.getPC().setType("none")
        # "reduced" takes tolerance and limit of this one
        self._set_krylov(ksp, "preonly" if is_direct or context is ReducedPC else "fgmres")
        self._max_it = ksp.getTolerances()[3]
        if ksp.getPC().getType() == "fieldsplit":
            kind = PETSc.Options(self.prefix).getString("pc_fieldsplit_type", "")
            ksp.getPC().setFieldSplitIS(*layout.index_sets(two=kind == "schur").items())
        if self._coupled is not None:
            self._coupled.split(ksp.getPC())
        return ksp

    def _set_krylov(self, ksp: PETSc.KSP, kind: str) -> None:
        """The Krylov method, unless the options say which."""
        ksp.setType(kind)
        ksp.setGMRESRestart(FLAT_RESTART if self.way == "wathen" else RESTART)
        family = "gmres" if PETSc.Sys.getVersion() < (3, 26) else "orthogonalization"
        with defaults({f"{self.prefix}ksp_{family}_cgs_refinement_type": "refine_ifneeded"}):
            ksp.setFromOptions()  # states and multipliers differ by orders of magnitude: bases lose orthogonality

    @logged("pdeoptKKTSetUp")
    def set_point(self, lin: Linearization, lam: PETSc.Vec | None = None, fixed: Tensor | None = None) -> None:
        """Move to a linearization, see `KKTOperator`; factors are renewed at the next solve."""
        self.operator.set_point(lin, lam, fixed)
        free_garbage(self.problem.grid.comm)  # vectors of the last step, before the next ones come
        self._set_operators()
        if PETSc.Options(self.prefix).hasName("mat_view"):
            self._show_matrix()

    def _set_operators(self) -> None:
        """The matrix of the present point in the form that the present way takes."""
        self._is_factored = False
        if self.is_assembled:
            self._matrix = self.operator.assemble()
        else:
            self._matrix = self._matrix or self.operator.shell()
            self._matrix.stateIncrease()  # tells PETSc that it changed
        self._ksp.setOperators(self._matrix if self._coupled is None else self._coupled.assemble())

    def _use(self, way: str) -> None:
        """Solve in another way from here on."""
        if way == self.way:
            return
        self._ksp.destroy()
        if self._matrix is not None and not self.is_assembled:
            self._matrix.destroy()
        self.way, self._matrix = way, None
        self._ksp = self._create_ksp()
        self._set_operators()

    def _show_matrix(self) -> None:
        """The matrix of the system by `-{prefix}mat_view`, assembled where it can be."""
        matrix = self._ksp.getOperators()[0]
        if matrix.getType() == "python" and self.problem.constraint.pattern is not None:
            matrix = self.operator.assemble()
        matrix.setOptionsPrefix(self.prefix)
        matrix.viewFromOptions("-mat_view")

    @logged("pdeoptKKTSolve")
    def solve(self, rhs: PETSc.Vec, rtol: float, size: float | None = None) -> PETSc.Vec:
        """s with |r - K s| <= rtol |r| in the dual norms of the problem; a new vector. |r| may be given as `size`.

        Where "reduced" meets a direction along which the Hessian curves down, `curves_down` is True, and s is where
        conjugate gradients were before: the quadratic model falls along it.

        Raises:
            InputError: an option of the linear solver that is not legal.
            SolveFailure: a singular or not finite matrix, or the tolerance is out of reach.
        """
        assert self._matrix is not None, "set_point comes first"
        self.curves_down = False
        if self._is_projection:
            return self._by_sweeps(rhs, rhs.duplicate())
        first = self.norm(rhs) if size is None else size
        refinement = Refinement(rhs, first, self.norm)
        while True:
            self._use(self.choice.way)
            try:
                self._refine(refinement, rtol * first)
            except (InputError, SolveFailure) as error:
                refinement.leave()
                is_option = isinstance(error, InputError) and error.is_option
                if is_option or not self._give_up():
                    raise
                continue
            enough = rtol if self.choice.present.patience is not None else max(rtol, ROUNDING_RTOL)
            if refinement.size <= enough * first or self.curves_down:
                refinement.free()
                return refinement.solution
            if not self._give_up():
                break
        raise SolveFailure(
            f"KKT system: relative residual {refinement.size / max(first, TINY):.1e} where {rtol:.1e} was asked for "
            f"(KSP reason {self._ksp.getConvergedReason()})",
            f"see -{self.prefix}ksp_converged_reason; " + self._other_way(),
        )

    def _give_up(self) -> bool:
        """Go on to the next way that may suit; returns whether there is one. Collective."""
        goes_on = self.choice.give_up()
        if goes_on and self.choice.way == "wathen" and not sees_all_states(self.operator):
            return self.choice.give_up()  # no shift matches a state that the objective does not see
        return goes_on

    def _other_way(self) -> str:
        """What to try where the present linear solver failed."""
        if self.way != "direct":
            return f"-{self.prefix}precond direct factors the matrix"
        if self.is_mumps and (code := self._ksp.getPC().getFactorMatrix().getMumpsInfog(1)) < 0:
            return f"INFOG(1) of MUMPS is {code}"
        return f"the matrix is singular or nearly so; -{self.prefix}precond wathen iterates"

    def _refine(self, refinement: Refinement, target: float) -> None:
        """Improve a solution in the present way, until what it leaves is at most `target` or no longer falls.

        Corrections follow where PETSc's norm and the problem's disagree.
        """
        assert self._matrix is not None
        left = self.choice.present.limit(min(1.0, target / max(refinement.size, TINY)))
        for _ in range(1 + MAX_REFINEMENTS):
            last, is_first = refinement.size, refinement.remainder is refinement.rhs
            if last <= target or left <= 0:
                break
            is_alone = self._take_krylov()
            self._ksp.setTolerances(rtol=min(0.1, 0.5 * target / last), max_it=int(min(left, self._max_it)))
            if self._reduced is not None:
                self._reduced.size, self._reduced.foresees = last, self.choice.present.foresees
            self._correct(refinement.remainder, refinement.room)
            left -= self._count()
            if self._reduced is not None and self._reduced.gave_up:
                refinement.leave()  # it is no correction
                break
            known = math.inf if self._reduced is None else self._reduced.missed
            refinement.add(self._matrix, known if known <= target else None)
            if not (refinement.size < last or self.curves_down):  # also for NaN: what was there is better
                refinement.take_back(self._matrix, is_first)
            if self.curves_down or not (refinement.size < 0.9 * last or (is_alone and not self._take_krylov())):
                break

    def _take_krylov(self) -> bool:
        """Take flexible GMRES, which has ten vectors before it begins, around "wathen" only where one application is no
        solve; returns whether it is one."""
        context = self._context
        if not isinstance(context, WathenPC) or PETSc.Options(self.prefix).hasName("ksp_type"):
            return False
        with as_raised():
            self._ksp.getPC().setUp()
        kind = "preonly" if context.is_solver else "fgmres"
        if self._ksp.getType() != kind:
            self._set_krylov(self._ksp, kind)
        return context.is_solver

    def _by_sweeps(self, rhs: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = K^-1 rhs where two sweeps are exact: a residual would cost as much again, and tell nothing."""
        self._correct(rhs, out)
        self.iterations += 1
        if not math.isfinite(out.norm()):
            raise SolveFailure("KKT system: a sweep over time is not finite", "take smaller time steps")
        return out

    @property
    def _is_projection(self) -> bool:
        """Whether the system is one of the design's metric alone, solved by sweeps."""
        return self._reduced is not None and self.operator.hessian == "design" and self.operator.fixed is None

    @property
    def _context(self) -> Any:
        """That of a preconditioner in Python; None for PETSc's own."""
        pc = self._ksp.getPC()
        return pc.getPythonContext() if pc.getType() == "python" else None

    @property
    def _reduced(self) -> ReducedPC | None:
        """The context of the preconditioner, where that is "reduced"."""
        return self._context if isinstance(self._context, ReducedPC) else None

    def _count(self) -> int:
        """Iterations of the last solve of the KSP, and its curvature."""
        taken = int(self._ksp.getIterationNumber())
        if self._reduced is not None:
            taken, self.curves_down = self._reduced.iterations, self._reduced.curves_down
        self.iterations += taken
        return taken

    def solve_blocks(self, g: PETSc.Vec, c: PETSc.Vec, rtol: float, size: float | None = None) -> tuple[PETSc.Vec, ...]:
        """The primal and the multiplier part of K s = [g | c]; see `solve`."""
        rhs = self.problem.layout.join_kkt(g, c, self.problem.create_kkt())
        with freed(rhs):
            solution = self.solve(rhs, rtol, size)
        with freed(solution):
            x, lam = self.problem.create_primal(), self.problem.create_multiplier()
            self.problem.layout.split_kkt(solution, x, lam)
        return x, lam

    def _correct(self, rhs: PETSc.Vec, out: PETSc.Vec) -> None:
        """out = K^-1 rhs, as good as KSP takes it, in the form of the settings."""
        if self._coupled is None:
            self._solve_with_room(rhs, out)
        else:
            right = self._coupled.to_coupled(rhs)
            left = right.duplicate()
            self._solve_with_room(right, left)
            self._coupled.to_standard(left, out)

    def _solve_with_room(self, rhs: PETSc.Vec, out: PETSc.Vec) -> None:
        """Solve; where MUMPS ran out of workspace, with more of it."""
        for _ in range(6):
            with as_raised():
                self._ksp.solve(rhs, out)
            if not self.is_mumps:
                return
            factor = self._ksp.getPC().getFactorMatrix()
            if factor.getMumpsInfog(1) not in MUMPS_OUT_OF_ROOM:
                self._is_factored = factor.getMumpsInfog(1) >= 0
                return
            room = 2 * max(factor.getMumpsIcntl(14), 50)
            PETSc.Options(self.prefix).setValue("mat_mumps_icntl_14", str(room))
            matrix = self._ksp.getOperators()[0]
            self._ksp.reset()  # MUMPS does not recover from this error: it starts again
            self._ksp.setOperators(matrix)

    @property
    def is_mumps(self) -> bool:
        """Whether the factors are those of MUMPS, which tells their inertia."""
        pc = self._ksp.getPC()
        return pc.getType() in ("lu", "cholesky") and pc.getFactorSolverType() == "mumps"

    def factor(self) -> None:
        """Factor the matrix of the present point now, where MUMPS does so at all. Collective."""
        if self.is_mumps:
            right = self._ksp.getOperators()[0].createVecRight()
            self._solve_with_room(right, right.duplicate())

    def descents(self) -> int | None:
        """The number of negative eigenvalues of the reduced Hessian, by Sylvester's law from the factors' inertia.

        K has as many negative eigenvalues as F' has rows, and these (N. I. M. Gould, On practical conditions for the
        existence and uniqueness of solutions to the general equality quadratic programming problem, Math. Program. 32,
        1985). None where the standard form was not factored since the last `set_point`.
        """
        if not (self._is_factored and self._coupled is None and self._ksp.getPC().getType() == "cholesky"):
            return None
        rows = self.problem.grid.sum(self.problem.layout.state_size)
        return int(self._ksp.getPC().getFactorMatrix().getMumpsInfog(12)) - int(rows)

    def norm(self, k: PETSc.Vec) -> float:
        """The dual norm of a right-hand side or residual [g | c]."""
        g, c = self.problem.layout.kkt_fields(k)
        return dual_length(self.metric, *g, c)

    @property
    def ksp(self) -> PETSc.KSP:
        """PETSc's solver, at the operator of the present point."""
        return self._ksp

    @property
    def note(self) -> str:
        """The present way for a monitor's line, where it was left open."""
        return f"by {self.choice.way}" if len(self.choice.stages) > 1 else ""

    def take_iterations(self) -> int:
        """Krylov iterations since the last call."""
        taken, self.iterations = self.iterations, 0
        return taken

    def destroy(self) -> None:
        """Free matrix, factors and solver."""
        self._ksp.destroy()
        if not self.is_assembled and self._matrix is not None:
            self._matrix.destroy()
        self.operator.free()
