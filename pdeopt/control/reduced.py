"""The reduced objective z -> J(u(z), z) as a smooth function, with windows of time as the parts of its unknowns.

The local function of a window of steps a+1..b is the objective of these steps alone, from the state u_a that the whole
has, with what the steps after them say about u_b:

    sum_{i in window} J_i(u_i, z_i) + c.u_b,   c = (dF_{b+1}/du_b)' lam_{b+1}

Its gradient at the present controls is that of the whole, and it costs the window's share of the steps. With a horizon
of h steps, h more steps are solved for, their controls fixed, before c stands for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import DesignForm, RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.time_windows import window_problem
from pdeopt.core.arrays import assign, copy, writable
from pdeopt.core.autodiff import plainly
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.settings import Settings, read, setting
from pdeopt.functions.decomposition import Decomposition, number_of_parts
from pdeopt.functions.smooth import Costs, DiagonalMetric, Metric, Operator, Restriction, SmoothFunction
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

    Args:
        problem: the control problem.
        gauss_newton: leave the constraint's curvature out of Hessian products.
        costs: of the calls; default `SWEEP_COSTS`.
        **defaults: settings that replace the defaults of `WindowSettings`; options win.

    Example:
        >>> f = ReducedObjective(problem)
        >>> value, gradient = f.value_and_gradient(torch.zeros(f.size, dtype=torch.float64))
        >>> result = LBFGS(f).minimize(torch.zeros(f.size, dtype=torch.float64))
    """

    def __init__(
        self, problem: ControlProblem, gauss_newton: bool = False, costs: Costs = SWEEP_COSTS, **defaults: Any
    ) -> None:
        super().__init__(problem.layout.design_size, problem.grid.mpi, costs)
        self.problem, self.gauss_newton, self.settings = problem, gauss_newton, read(WindowSettings, **defaults)
        self._state: PETSc.Vec | None = None
        self._lin: Linearization | None = None
        self._multiplier: PETSc.Vec | None = None

    @plainly
    def _value(self, x: Tensor) -> float:
        try:
            return self.linearization(x).value
        except SolveFailure:
            return math.inf

    @plainly
    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """J, and J_z + F_z' lam."""
        value = self._value(x)
        if not math.isfinite(value):
            return value, torch.zeros_like(x)
        lin = self.linearization(x)
        if len(lin.stretches) > 1:
            self._multiplier, gradient = adjoint_by_stretches(lin)
            return value, gradient
        _, jz, jp = lin.gradient_fields
        _, fz, fp = lin.vjp_fields(self.problem.layout.rows(self.multiplier(x)))
        return value, torch.cat([jz + fz, (jp + fp)[: self.problem.layout.param_size]])

    @plainly
    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        lam = None if self.gauss_newton else self.multiplier(x)
        return reduced_hessian(self.problem, self.linearization(x), lam, _design_vector(self.problem, d))

    # -- the point -------------------------------------------------------------------------------------------

    def linearization(self, x: Tensor) -> Linearization:
        """The problem at (u(z), z); kept until another design is asked for. Collective. Raises `SolveFailure`."""
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
        """Whether x is the design whose linearization is kept, on all ranks. Collective."""
        layout, lin = self.problem.layout, self._lin
        z, p = x.split([layout.control_size, layout.param_size])
        is_kept = lin is not None and torch.equal(z, lin.z) and torch.equal(p, lin.p[: layout.param_size])
        return bool(self.comm.allreduce(int(not is_kept)) == 0)

    def start_from(self, u: Tensor) -> None:
        """Begin the next state solve with these states, (n_local, n)."""
        self._state = self.problem.create_multiplier()
        assign(self._state, u)

    def state(self, x: Tensor) -> PETSc.Vec:
        """The state at x, a new vector. Collective. Raises `SolveFailure`."""
        self.linearization(x)
        assert self._state is not None
        return self._state.copy()

    def multiplier(self, x: Tensor) -> PETSc.Vec:
        """The adjoint at x. Collective. Raises `SolveFailure`."""
        lin = self.linearization(x)
        if self._multiplier is None:
            self._multiplier = self.problem.solve_adjoint(lin)
        return self._multiplier

    # -- windows of time ---------------------------------------------------------------------------------------

    def decompose(self, parts: int | None = None, overlap: int = 0, team: object = None) -> Decomposition:
        """Windows of time of nearly equal numbers of steps; a rank works alone on windows that it owns whole.

        Raises:
            InputError: more windows than steps.
        """
        problem, grid = self.problem, self.problem.grid
        if not self._has_windows:
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
        if not (self._has_windows and is_window and is_mine):
            return super().local(decomposition, part, x)
        if not self.is_at(x):
            self.value_and_gradient(x)
        return WindowFunction(self, a // m, b // m, x)

    @property
    def _has_windows(self) -> bool:
        return self.problem.control_map is None and self.problem.param_dim == 0

    def preconditioner(self) -> Operator | None:
        """The inverse of the objective's own Hessian in the controls: the whole is this plus a compact operator."""
        return None if self.control_form is None else DesignForm(self.problem, self.control_form).solve

    def metric(self, kind: str) -> Metric:
        """Of kind "riesz": that of functions in space-time, lumped; see `RieszMetric.root`."""
        if kind != "riesz":
            raise InputError("metric of a reduced objective", kind, "none | riesz")
        return DiagonalMetric(copy(RieszMetric(self.problem).root()))

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


def _design_vector(problem: ControlProblem, x: Tensor) -> PETSc.Vec:
    z = problem.create_design()
    assign(z, x)
    return z


def reduced_hessian(problem: ControlProblem, lin: Linearization, lam: PETSc.Vec | None, design: PETSc.Vec) -> Tensor:
    """Z'L''Z times a direction of the design variables, by a sweep forward and one backward. Collective.

    Args:
        problem: the control problem.
        lin, lam: its linearization at a point, and the multiplier there; None leaves the constraint's curvature out.
        design: the direction [z | p].

    Returns:
        The flat entries of this rank, (design_size,).

    Raises:
        SolveFailure: the state Jacobian is singular.
    """
    layout, propagator = problem.layout, problem.propagator
    dx = layout.join(layout.create_multiplier(), design)
    du = propagator.forward(lin.jacobian, -layout.rows(lin.jvp(dx, layout.create_multiplier())))
    layout.pack(dx, du, *layout.design_fields(design))
    w_u, w_z, w_p = layout.fields(lin.hvp(lam, dx, layout.create_primal()))
    _, fz, fp = lin.vjp_fields(propagator.backward(lin.jacobian, -w_u))
    return torch.cat([w_z + fz, (w_p + fp)[: layout.param_size]])


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
            u, z, steps = lin.u[rows], lin.z_step[rows], lin.steps[rows]
            j_u, j_z, j_p = lin.objective.gradient(u, z, steps)
            r = -j_u
            r[-1] -= following
            jacobian = lin.constraint.linearize(lin.u_old[rows], u, z, steps)
            lam[rows] = jacobian.backward_sweep(r)
            w_old, _, w_z, w_p = jacobian.vjp(lam[rows])
            g_z[rows], g_p, following = j_z + w_z, g_p + j_p + w_p, w_old[0]
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
        reduced = ReducedObjective(window_problem(problem, *steps, lin.u_old[a], following[last - 1]))
        reduced.start_from(lin.u[a:last])
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
