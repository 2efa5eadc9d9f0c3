"""Derivatives of a solution by what its problem is made of, by one linear solve with the KKT matrix at hand.

Let q be tensors in a user's residual, objective, initial state, target or path constraints. The optimality system
G(x, lam; q) = (L_x, F) = 0 of L = J + lam.F defines the solution as a function of q, with K = G_(x,lam):

    direct:   K (dx, dlam) = -G_q dq;        adjoint:   K v = w,   q' = -G_q' v + J' L_q

for a cotangent w of (x, lam) and J' of the optimal value, whose derivative is L_q. (A. V. Fiacco, Introduction to
Sensitivity and Stability Analysis in Nonlinear Programming, 1983. For control problems: R. Griesse, Parametric
sensitivity analysis in optimal control of a reaction-diffusion system, Numer. Funct. Anal. Optim. 25, 2004.) Design
variables at active bounds stay there; with inequalities c <= 0 and slacks, s nu = const along the path of solutions, so
that K gains c' diag(sigma) c', sigma = w nu/s, and G_q dq the rows c'^T sigma c_q dq.
"""

from __future__ import annotations

import atexit
import math
import weakref
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign, copy
from pdeopt.core.autodiff import plainly
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import ControlResult
from pdeopt.core.ranks import all_come
from pdeopt.optimize.fullspace.interior import InequalityResult, suited
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.parts.bounds import Bounds
from pdeopt.optimize.parts.inequalities import Inequalities
from pdeopt.optimize.solutions.recorded import RecordedLagrangian
from pdeopt.steps.timegrid import require_whole_steps
from pdeopt.steps.vectorlayout import Fields

#: |L_x| of a solution, relative to |J'|, and in tolerances that it was solved to.
STATIONARY, TOLERANCES = 1e-3, 1e3

NUMBERS = count()

#: By how much J may differ from that of the result, relative.
SAME_VALUE = 1e-6


class Optimum(NamedTuple):
    """A solution as tensors, or a derivative of one.

    Attributes:
        state: u of this rank's steps, (n_local, n).
        control: flat design controls of this rank, (control_size,).
        parameters: p, (param_dim,), on all ranks.
        multiplier: lam, (n_local, n).
        value: J, a scalar, on all ranks.
    """

    state: Tensor
    control: Tensor
    parameters: Tensor
    multiplier: Tensor
    value: Tensor


#: Those that have a linear solver. PETSc does not stand solvers that are left when the interpreter ends.
OPEN: weakref.WeakSet[Sensitivity] = weakref.WeakSet()


@atexit.register
def free_all() -> None:
    """Free the solvers that are left, in the order in which all ranks made them; not where one of them failed."""
    left = sorted(OPEN, key=lambda how: how.number)
    for each in left if left and all_come() else ():
        each.destroy()


class Sensitivity:
    """How a solution, its multiplier and its value depend on parameters q of the problem. Calls are collective.

    Where active sets are not strict (a bound is kept, and its multiplier is zero), there is a derivative to one side
    only, and this is that of the free variable. With inequalities on states such entries are blurred by what is left of
    s nu: solve to a smaller tolerance, `opt_tol=1e-11`, where their derivatives matter.

    Args:
        problem: the control problem.
        result: a converged result of it, of any method.
        parameters: q, tensors that require gradients and that the user's functions are made of: in the residual, the
            objective, the initial state, as targets of `Tracking`, as weight of `ControlCost`, in a `PathConstraint`;
            the same on all ranks.
        lower, upper, state_lower, state_upper, path: as they were given to `solve`. They do not depend on q, but
            functions of `path` may.
        rtol: relative tolerance of the linear solves.
        **kkt: settings of these, by the names of `KKTSettings`; options are those of `-sqp_kkt_`.

    Raises:
        InputError: a result that did not converge, is of another problem, or whose bounds were not given again;
            parameters that do not require gradients, or that nothing depends on.

    Example:
        >>> k = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        >>> problem = ControlProblem(Heat(k), objective, grid)
        >>> how = Sensitivity(problem, solve(problem), [k])
        >>> how.direct(1.0).state                     # du/dk, (n_local, n)
        >>> how.adjoint(state=w, value=1.0)           # [d(w.u + J)/dk]
    """

    @plainly
    def __init__(
        self,
        problem: ControlProblem,
        result: ControlResult,
        parameters: Sequence[Tensor],
        *,
        lower: Any = None,
        upper: Any = None,
        state_lower: Any = None,
        state_upper: Any = None,
        path: Any = None,
        rtol: float = 1e-10,
        **kkt: Any,
    ) -> None:
        require_whole_steps(problem.grid, "sensitivities")
        self.problem, self.parameters, self.rtol = problem, _tensors(parameters), rtol
        self.metric, lin = RieszMetric(problem), problem.at(problem.join(result.state, result.design))
        self._lin, self._rows, self._sigma, precond, point = lin, None, None, "auto", lin
        g, bound_path = lin.lagrangian_gradient(result.multiplier), None
        if isinstance(result, InequalityResult):
            self._rows = rows = Inequalities(problem, lower, upper, state_lower, state_upper, path)
            nu, slack = (_gathered(rows, result, name) for name in ("density", "slack"))
            self._sigma, bound_path = torch.where(rows.kept, rows.weight * nu / slack, 0.0), (rows.at, rows.weight * nu)
            point, precond = rows.with_hessian(lin, self._sigma, nu), suited(problem, rows)
            g.axpy(1.0, rows.vjp(lin, rows.weight * nu))
            lower = upper = None
        self._fixed = self._held(Bounds.of(problem, lower, upper), copy(result.design), g)
        require_solution(self.metric, lin, result, g, self._fixed)
        self._recorded = RecordedLagrangian(
            problem, lin, problem.layout.rows(result.multiplier), self.parameters, bound_path
        )
        used = problem.grid.sum(torch.tensor([float(each) for each in self._recorded.used]))
        if not used.all():
            legal = "tensors that residual, objective, initial state or path are computed from by torch functions"
            raise InputError(f"parameters[{int(used.argmin())}]", "a tensor that nothing depends on", legal)
        self._words, self._place = (precond, kkt), (point, result.multiplier)
        self._kkt: KKTSolver | None = None
        self.number = next(NUMBERS)

    def _solver(self) -> KKTSolver:
        """The linear solver at the solution, made when it is first asked for."""
        if self._kkt is None:
            grid, (precond, settings) = self.problem.grid, self._words
            is_held = float(grid.max(self._fixed.any().double())) > 0
            self._kkt = KKTSolver(self.metric, "full", "sqp_", precond, settings)
            self._kkt.set_point(*self._place, self._fixed if is_held else None)
            OPEN.add(self)
            if grid.mpi.size == 1:  # nobody else waits
                self._end = weakref.finalize(self, self._kkt.destroy)
        return self._kkt

    def _held(self, bounds: Bounds, design: Tensor, g: Any) -> Tensor:
        """Design variables at an active bound, booleans, (design_size,)."""
        return bounds.free(design, copy(g)[self.problem.layout.state_size :]) == 0

    # -- both ways ---------------------------------------------------------------------------------------------

    @plainly
    def direct(self, *dq: Any) -> Optimum:
        """The derivative in a direction of the parameters.

        Args:
            dq: a tensor or number for each of `parameters`, in its shape.

        Raises:
            InputError: others.
            SolveFailure: the KKT matrix is singular: the solution is not isolated.
        """
        if len(dq) != len(self.parameters):
            raise InputError("directions", len(dq), f"{len(self.parameters)}, one for each of `parameters`")
        dq = tuple(_like(d, q, "direction") for d, q in zip(dq, self.parameters))
        problem, lin = self.problem, self._lin
        (u, before, z, p, c), path = self._recorded.direct(dq)
        old = torch.zeros_like(u)
        old[:1] = before
        u = u + problem.grid.shift_adjoint(old)[0]
        fields = u, lin.controls.adjoint(z), problem.grid.sum(p)
        if path is not None and self._rows is not None and self._sigma is not None:
            more = problem.fields(self._rows.vjp(lin, self._sigma * path))
            fields = fields[0] + more[0], fields[1] + more[1], fields[2] + more[2]
        (du, dz, dp), dlam = self._solve(fields, c)
        value = sum((part * d).sum() for part, d in zip(self._recorded.by_parameters(), dq))
        return Optimum(-du, -dz, -dp, -dlam, problem.grid.sum(value))

    @plainly
    def adjoint(
        self, state: Any = None, control: Any = None, parameters: Any = None, multiplier: Any = None, value: Any = None
    ) -> list[Tensor]:
        """The gradient by q of w.(u, z, p, lam, J), a tensor for each of `parameters`, on all ranks.

        Args:
            state, control, parameters, multiplier, value: w, in the shapes of `Optimum`; None for zero. Those of p and
                J, which all ranks have, are averaged over ranks; those of rows add up.

        Raises:
            InputError: other shapes.
            SolveFailure: the KKT matrix is singular: the solution is not isolated.
        """
        problem, lin = self.problem, self._lin
        u = _like(state, lin.u, "state")
        z, p = _like(control, lin.z, "control"), _like(parameters, lin.p, "parameters")
        lam, J = _like(multiplier, lin.u, "multiplier"), _like(value, lin.p.new_zeros(()), "value")
        mean = problem.grid.sum(torch.cat([p, J.reshape(1)])) / problem.grid.mpi.size
        total = [float(mean[-1]) * part for part in self._recorded.by_parameters()]
        asks = torch.tensor(float(any(bool(w.any()) for w in (u, z, mean[:-1], lam))))
        if float(problem.grid.max(asks)) > 0:
            (vu, vz, vp), vlam = self._solve((u, z, mean[:-1]), lam)
            r = None
            if self._rows is not None and self._sigma is not None:
                v = problem.layout.pack(problem.create_primal(), vu, vz, vp)
                r = self._sigma * self._rows.jvp(lin, v)
            directions = [vu, problem.grid.shift(vu)[:1], lin.controls(vz), vp, vlam]
            total = [w - part for w, part in zip(total, self._recorded.adjoint(directions, r))]
        return [problem.grid.sum(w).to(q.dtype) for w, q in zip(total, self.parameters)]

    def _solve(self, g: Fields, c: Tensor) -> tuple[Fields, Tensor]:
        """K^-1 (g, c), with no part in fixed design variables."""
        problem, layout = self.problem, self.problem.layout
        right, rows = layout.pack(problem.create_primal(), *g), problem.create_multiplier()
        entries = copy(right)
        entries[layout.state_size :] = torch.where(self._fixed, 0.0, entries[layout.state_size :])
        assign(right, entries)
        assign(rows, c)
        if not (math.isfinite(right.norm()) and math.isfinite(rows.norm())):
            raise InputError("sensitivity", "NaN or infinite entries in G_q or in what is asked for", "finite numbers")
        x, lam = self._solver().solve_blocks(right, rows, self.rtol)
        return problem.fields(x), layout.rows(lam)

    def destroy(self) -> None:
        """Free matrix and factors; a later call makes new ones. On one rank that is done with the object, too."""
        if self._kkt is not None:
            if self.problem.grid.mpi.size == 1:
                self._end.detach()
            self._kkt.destroy()
            self._kkt = None
            OPEN.discard(self)


def require_solution(
    metric: RieszMetric, lin: Linearization, result: ControlResult, g: PETSc.Vec, fixed: Tensor | None = None
) -> None:
    """Raise `InputError` unless a result converged, and J and L_x say that it is a solution of the problem. Collective.

    Args:
        metric: of the problem.
        lin: the problem at the result.
        result: the result.
        g: L_x there, with multipliers of paths.
        fixed: which design variables of this rank are at active bounds, (design_size,).
    """
    if not result.converged:
        raise InputError("result", result.message, "a solution that converged")
    if fixed is not None:
        entries = copy(g)
        entries[lin.layout.state_size :] = torch.where(fixed, 0.0, entries[lin.layout.state_size :])
        assign(g, entries)
    found, scale = metric.dual_norm(g), metric.dual_norm(lin.gradient)
    tol = TOLERANCES * float(getattr(result.history[-1], "optimality", 0.0)) if len(result.history) else 0.0
    if not abs(lin.value - result.objective) <= SAME_VALUE * max(abs(lin.value), 1e-12) + tol:
        raise InputError("result", f"J = {result.objective:.8g}, here {lin.value:.8g}", "a result of this problem")
    if not found <= max(STATIONARY * scale, tol):
        legal = "a solution of this problem; bounds and paths are given again, as to `solve`"
        raise InputError("result", f"a gradient of the Lagrangian of {found:.2e}, that of J is {scale:.2e}", legal)


def _tensors(parameters: Sequence[Tensor]) -> list[Tensor]:
    several = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for k, q in enumerate(several):
        if not (isinstance(q, Tensor) and q.is_floating_point() and q.requires_grad):
            got = f"{type(q).__name__}" + (f" of type {q.dtype} without gradients" if isinstance(q, Tensor) else "")
            raise InputError(f"parameters[{k}]", got, "a tensor of real numbers that requires gradients")
    if not several:
        raise InputError("parameters", "none", "tensors that require gradients")
    return several


def _like(values: Any, like: Tensor, what: str) -> Tensor:
    """Values in the shape of a tensor; zeros for None."""
    if values is None:
        return torch.zeros_like(like, requires_grad=False)
    found = torch.as_tensor(values, dtype=torch.float64).detach()
    if found.shape != like.shape and not (found.numel() == like.numel() == 1):
        raise InputError(what, f"shape {tuple(found.shape)}", f"shape {tuple(like.shape)}")
    return found.reshape(like.shape)


def _gathered(rows: Inequalities, result: InequalityResult, name: str) -> Tensor:
    """Rows (n_local, K) of all groups of a result."""
    missing = [group.name for group in rows.groups if group.name not in result.inequalities]
    if missing or len(rows.groups) != len(result.inequalities):
        got = ", ".join(group.name for group in rows.groups)
        raise InputError("inequalities", got, f"those of the result: {', '.join(result.inequalities)}")
    return torch.cat([getattr(result.inequalities[group.name], name) for group in rows.groups], dim=1)
