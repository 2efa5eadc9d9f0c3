"""The reduced objective z -> J(u(z), z) as a smooth function, with windows of time as the parts of its unknowns.

The local function of a window of steps a+1..b is the objective of these steps alone, from the state u_a that the whole
has, with what the steps after them say about u_b:

    sum_{i in window} J_i(u_i, z_i) + c.u_b,   c = (dF_{b+1}/du_b)' lam_{b+1}

Its gradient at the present controls is that of the whole, and it costs the window's share of the steps. With a horizon
of h steps, h more steps are solved for, their controls fixed, before c stands for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.checkpointing import CheckpointedSweeps, CheckpointSettings, ReducedPoint
from pdeopt.control.linearization import Elimination, Linearization
from pdeopt.control.metric import DesignForm, RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.state_solve import adjoint_of_steps
from pdeopt.control.time_windows import window_problem
from pdeopt.core.arrays import assign, copy, writable
from pdeopt.core.autodiff import plainly
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.settings import Settings, read, setting
from pdeopt.functions.checked import NoHessianProducts
from pdeopt.functions.decomposition import Decomposition, number_of_parts
from pdeopt.functions.metrics import DiagonalMetric
from pdeopt.functions.smooth import Costs, Metric, Operator, Restriction, SmoothFunction
from pdeopt.steps.innerproduct import InnerProduct

#: A state solve and an adjoint solve; a Hessian product takes one of each, too.
SWEEP_COSTS = Costs(value=0.5, gradient=1.0, hessian_product=1.0)


@dataclass(frozen=True)
class WindowSettings(Settings, prefix="window_"):
    """Windows of time as parts of the controls."""

    coarse: int = setting(
        8, "windows of the coarse space of a time hierarchy, where the steps allow it; 0 for none", at_least=0
    )
    horizon: int = setting(0, "steps beyond a window that its local function solves for", at_least=0)


class ReducedObjective(SmoothFunction):
    """J(u(z, p), z, p) over the design variables [z | p], by adjoints.

    The unknowns are the flat entries of `problem.create_design()` on this rank; `PetscFunction` gives the same function
    on PETSc vectors. A value is a state solve, which starts from the state of the last design; a gradient is one
    adjoint solve more, and a Hessian product one forward and one backward sweep (second-order adjoint). A design whose
    state cannot be solved for has the value infinity, which every line search and trust region backs away from.

    With `-reduced_checkpoints k`, k states are kept instead of all, and the others are solved for again where the
    adjoint needs them, see `CheckpointedSweeps`; there are then no Hessian products, and windows are not local.

    Args:
        problem: the control problem.
        gauss_newton: leave the constraint's curvature out of Hessian products.
        costs: of the calls; default `SWEEP_COSTS`.
        checkpoints, checkpoints_disk: defaults of `CheckpointSettings`; options win.
        start: states that the first state solve begins with, (n_local, n); default the constant state.
        **defaults: settings that replace the defaults of `WindowSettings`; options win.

    Raises:
        InputError: checkpoints without their library, or with -propagator mgrit.

    Example:
        >>> f = ReducedObjective(problem)
        >>> value, gradient = f.value_and_gradient(torch.zeros(f.size, dtype=torch.float64))
        >>> result = LBFGS(f).minimize(torch.zeros(f.size, dtype=torch.float64))
    """

    def __init__(
        self,
        problem: ControlProblem,
        gauss_newton: bool = False,
        costs: Costs = SWEEP_COSTS,
        checkpoints: int = 0,
        checkpoints_disk: str = "",
        start: Tensor | None = None,
        **defaults: Any,
    ) -> None:
        super().__init__(problem.layout.design_size, problem.grid.mpi, costs)
        self.problem, self.gauss_newton, self.settings = problem, gauss_newton, read(WindowSettings, **defaults)
        self._riesz, self._state = RieszMetric(problem), None if start is None else _state_vector(problem, start)
        self._lin: Linearization | None = None
        self._multiplier: PETSc.Vec | None = None
        few = read(CheckpointSettings, checkpoints=checkpoints, checkpoints_disk=checkpoints_disk)
        #: the sweeps that keep few states, and the last point with what they found there; None where all are kept
        self.sweeps = CheckpointedSweeps(problem, few) if few.checkpoints else None
        self._last: tuple[Tensor, ReducedPoint] | None = None

    @plainly
    def _value(self, x: Tensor) -> float:
        try:
            if self.sweeps is None:
                return self.linearization(x).value
            return self.evaluation(x).value if self.is_at(x) else self.sweeps.value(_design_vector(self.problem, x))
        except SolveFailure:
            return math.inf

    @plainly
    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """J, and J_z + F_z' lam."""
        if self.sweeps is not None:
            try:
                return self.evaluation(x)[:2]
            except SolveFailure:
                return math.inf, torch.zeros_like(x)
        value = self._value(x)
        if not math.isfinite(value):
            return value, torch.zeros_like(x)
        lin = self.linearization(x)
        if len(lin.stretches) > 1:
            self._multiplier, gradient = adjoint_by_stretches(lin)
            return value, gradient
        return value, reduced_gradient(lin, self.multiplier(x))

    @plainly
    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        if self.sweeps is not None:
            legal = "methods without them (-tao_type lmvm | blmvm | bncg, or lbfgs), or -reduced_checkpoints 0"
            raise NoHessianProducts("-reduced_checkpoints", "Hessian products, which need all states", legal)
        lam = None if self.gauss_newton else self.problem.layout.rows(self.multiplier(x))
        return reduced_hessian(self.problem, self.linearization(x), lam, d)

    # -- the point -------------------------------------------------------------------------------------------

    def evaluation(self, x: Tensor) -> ReducedPoint:
        """Value, gradient and the state's residual; little work where they were just asked for. Collective.

        Raises `SolveFailure`.
        """
        if self.sweeps is None:
            lin = self.linearization(x)
            feasibility = self._riesz.feasibility(lin)
            return ReducedPoint(lin.value, reduced_gradient(lin, self.multiplier(x)), feasibility)
        if self._last is None or not self.is_at(x):
            self._last = None
            self._last = x.clone(), self.sweeps.evaluate(_design_vector(self.problem, x))
        value, gradient, feasibility = self._last[1]
        return ReducedPoint(value, gradient.clone(), feasibility)

    def linearization(self, x: Tensor) -> Linearization:
        """The problem at (u(z), z); kept until another design is asked for. Collective. Raises `SolveFailure`."""
        if self.sweeps is not None:
            raise InputError("-reduced_checkpoints", "a method that needs all states at once", "0")
        if not self.is_at(x):
            last = self._lin
            jacobian = None if last is None or len(last.stretches) > 1 else last.jacobian
            last = self._lin = self._multiplier = None
            z = _design_vector(self.problem, x)
            self._state = self.problem.solve_state(z, self._state, jacobian)
            point = self.problem.join(self._state, z)
            z.destroy()  # these two are large
            self._lin = self.problem.at(point)
            point.destroy()
        assert self._lin is not None
        return self._lin

    def is_at(self, x: Tensor) -> bool:
        """Whether x is the design of which most is known, on all ranks. Collective."""
        layout, is_kept = self.problem.layout, False
        if self._last is not None:
            is_kept = torch.equal(x, self._last[0])
        elif self._lin is not None:
            z, p = x.split([layout.control_size, layout.param_size])
            is_kept = torch.equal(z, self._lin.z) and torch.equal(p, self._lin.p[: layout.param_size])
        return bool(self.comm.allreduce(int(not is_kept)) == 0)

    def state(self, x: Tensor) -> PETSc.Vec:
        """The state at x, a new vector. Collective. Raises `SolveFailure`."""
        if self.sweeps is not None:
            return self.sweeps.state(_design_vector(self.problem, x))
        self.linearization(x)
        assert self._state is not None
        return self._state.copy()

    def multiplier(self, x: Tensor) -> PETSc.Vec:
        """The adjoint at x. Collective. Raises `SolveFailure`."""
        if self.sweeps is not None:
            return self.sweeps.multiplier(_design_vector(self.problem, x))
        lin = self.linearization(x)
        if self._multiplier is None:
            self._multiplier = self.problem.solve_adjoint(lin)
        return self._multiplier

    def solution(self, x: Tensor) -> tuple[PETSc.Vec | Callable[[], PETSc.Vec], PETSc.Vec | Callable[[], PETSc.Vec]]:
        """State and multiplier at x for a `ControlResult`; with checkpoints functions that find them. Collective.

        Raises `SolveFailure`.
        """
        if self.sweeps is None:
            return self.state(x), self.multiplier(x)
        return lambda: self.state(x), lambda: self.multiplier(x)

    # -- windows of time ---------------------------------------------------------------------------------------

    def decompose(self, parts: int | None = None, overlap: int = 0, team: object = None) -> Decomposition:
        """Windows of time of nearly equal numbers of steps; a rank works alone on windows that it owns whole.

        Raises:
            InputError: more windows than steps.
        """
        problem, grid = self.problem, self.problem.grid
        if not _has_windows(self):
            return super().decompose(parts, overlap)
        N, m = grid.num_steps, problem.m
        parts = number_of_parts(parts, N, "steps")
        cuts = [round(N * s / parts) for s in range(parts + 1)]
        windows = [(max(a - overlap, 0), min(b + overlap, N)) for a, b in pairwise(cuts)]
        own = [(max(a - grid.begin, 0), min(b - grid.begin, grid.n_local)) for a, b in windows]
        indices = [torch.arange(a * m, max(a, b) * m) for a, b in own]
        ends = grid.offsets
        owners = [r for a, b in windows for r in range(grid.mpi.size) if ends[r] <= a and b <= ends[r + 1]]
        if grid.mpi.size == 1 or len(owners) < parts:  # a window of several ranks
            return Decomposition(self.size, indices, grid.mpi)
        return Decomposition(self.size, indices, grid.mpi, grid.mpi, owners)

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        """The objective of a window; of other parts, the whole one. Collective.

        Costs a gradient where f and f' at x are not those that were asked for last.
        """
        m, indices = self.problem.m, decomposition.parts[part]
        a, b = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        is_window = b - a == len(indices) and a % m == b % m == 0
        is_mine = self.comm.size == 1 or decomposition.team is not None
        if not (_has_windows(self) and is_window and is_mine):
            return super().local(decomposition, part, x)
        if not self.is_at(x):
            self.value_and_gradient(x)
        return WindowFunction(self, a // m, b // m, x)

    def preconditioner(self) -> Operator | None:
        """The inverse of the objective's own Hessian in the controls: the whole is this plus a compact operator."""
        return None if self.control_form is None else DesignForm(self.problem, self.control_form).solve

    def metric(self, kind: str) -> Metric:
        """Of kind "riesz": that of functions in space-time, lumped; see `RieszMetric.root`."""
        if kind != "riesz":
            raise InputError("metric of a reduced objective", kind, "none | riesz")
        return DiagonalMetric(copy(self._riesz.root()))

    @cached_property
    def control_form(self) -> InnerProduct | None:
        """The objective's Hessian in the controls of each step; None where it is singular."""
        problem = self.problem
        if problem.param_dim:
            return None
        z = torch.zeros(problem.grid.n_local, problem.m, dtype=torch.float64)
        u = problem.initial_state(torch.zeros(problem.param_dim, dtype=torch.float64)).expand(len(z), -1)
        _, form = problem.objective.hessian_blocks(u, z, problem.grid.steps)
        form = form.agreed(problem.grid)
        if problem.grid.mpi.allreduce(int(bool(form.zero_rows().any()))):
            return None
        return form


def _has_windows(reduced: ReducedObjective) -> bool:
    problem = reduced.problem
    is_plain = problem.control_map is None and problem.param_dim == 0 and problem.grid.space_ranks == 1
    return is_plain and reduced.sweeps is None


def _design_vector(problem: ControlProblem, x: Tensor) -> PETSc.Vec:
    z = problem.create_design()
    assign(z, x)
    return z


def _state_vector(problem: ControlProblem, u: Tensor) -> PETSc.Vec:
    out = problem.create_multiplier()
    assign(out, u)
    return out


def reduced_gradient(lin: Linearization, lam: PETSc.Vec) -> Tensor:
    """J_z + F_z'lam and J_p + F_p'lam at a state with its adjoint, flat, (design_size,). Collective."""
    (_, j_z, j_p), rows = lin.gradient_fields, lin.layout.rows(lam)
    if not lin.layout.param_dim and len(lin.stretches) == 1:
        return j_z + lin.controls.adjoint(lin.jacobian.control_vjp(rows))
    _, f_z, f_p = lin.vjp_fields(rows)
    return torch.cat([j_z + f_z, (j_p + f_p)[: lin.layout.param_size]])


def reduced_hessian(problem: ControlProblem, lin: Linearization, lam: Tensor | None, design: Tensor) -> Tensor:
    """Z'L''Z times a direction of the design variables, by a sweep forward and one backward. Collective.

    Args:
        problem: the control problem.
        lin, lam: its linearization at a point, and the multiplier there, rows (n_local, n); None leaves the
            constraint's curvature out.
        design: the direction [z | p], flat entries of this rank.

    Returns:
        The same of the product, (design_size,).

    Raises:
        SolveFailure: the state Jacobian is singular.
    """
    return -Elimination(lin, problem.propagator, partial(lin.hvp_fields, lam))(design).rest


def adjoint_by_stretches(lin: Linearization) -> tuple[PETSc.Vec, Tensor]:
    """The adjoint and the reduced gradient on one rank, from the last stretch of steps to the first.

    Neither the Jacobian of more than a stretch nor a gradient of J in the states is kept.

    Args:
        lin: the linearization at a state that solves its equation.

    Returns:
        lam with J_u + F_u' lam = 0, a new vector; [J_z + F_z' lam | J_p + F_p' lam], flat, (design_size,).

    Raises:
        SolveFailure: the state Jacobian is singular.
    """
    multiplier = lin.layout.create_multiplier()
    g_z, g_p = torch.empty_like(lin.z_step), torch.zeros_like(lin.p)
    following = torch.zeros_like(lin.u0)  # B_{i+1}' lam_{i+1} of the step after a stretch
    with writable(multiplier) as entries:
        lam = entries.reshape(lin.u.shape)
        for rows in reversed(lin.stretches):
            part = lin.u_old[rows][0], lin.u[rows], lin.z_step[rows], lin.steps[rows], following
            lam[rows], g_z[rows], part_p, following = adjoint_of_steps(lin.constraint, lin.objective, *part)
            g_p = g_p + part_p
    g = lin.controls.adjoint(g_z)
    if not len(g_p):
        return multiplier, g
    return multiplier, torch.cat([g, g_p + lin.initial.gradient(lin.p) + lin.initial.vjp(lin.p, following)])


class WindowFunction(SmoothFunction):
    """d -> the objective of the steps of rows a to b of this rank at x + R' d, see above; its value at 0 is J.

    Args:
        whole: the function of all steps.
        a, b: rows of this rank, a <= row < b; an empty window for a part of another rank.
        x: the present design of this rank.
    """

    def __init__(self, whole: ReducedObjective, a: int, b: int, x: Tensor) -> None:
        problem = whole.problem
        self.m, last = problem.m, min(b + whole.settings.horizon, problem.grid.n_local)
        share = (last - a) / problem.grid.num_steps
        super().__init__((b - a) * self.m, costs=whole.costs.times(share), tally=whole.tally)
        lin, lam = whole.linearization(x), copy(whole.multiplier(x))
        following, _ = problem.grid.shift_adjoint(lin.jacobian.vjp(lam.reshape(-1, problem.n))[0])
        if a == b:
            return
        self._form = None if whole.control_form is None else whole.control_form[a:b]
        steps = problem.grid.begin + a, problem.grid.begin + last
        window = window_problem(problem, *steps, lin.u_old[a], following[last - 1])
        reduced = ReducedObjective(window, start=lin.u[a:last])
        present = x[a * self.m : last * self.m]
        self.steps = Restriction(reduced, torch.arange(self.size), present)
        self._offset = lin.value - reduced.evaluate_value(present)

    def _value(self, x: Tensor) -> float:
        return self._offset + self.steps.evaluate_value(x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.steps.evaluate(x)
        return self._offset + value, gradient

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.steps.evaluate_hvp(x, d)

    def preconditioner(self) -> Operator | None:
        form = self._form
        return None if form is None else lambda g: form.solve(g.reshape(-1, self.m)).reshape(-1)
