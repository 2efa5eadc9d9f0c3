"""`ControlProblem`: constraint, objective and time grid lifted to PETSc vectors.

The unknowns are x = [u | z] (states, then design variables: controls and, on rank 0, the global
parameters p) and the multiplier lam, each distributed as the time steps. `at(x)` gives a `Linearization`:
J, F and their derivatives at a point, a value with every operator that a solver needs.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.constraint import StepJacobian, TimeDependentConstraint
from pdeopt.control.controlmap import ControlMap
from pdeopt.control.objective import Objective
from pdeopt.control.propagator import Propagator
from pdeopt.control.serial_sweeps import march
from pdeopt.core.arrays import assign, copy, free_garbage, readonly
from pdeopt.core.autodiff import gradient, jvp, vjp
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.monitor import logged
from pdeopt.steps.timegrid import TimeGrid

#: An old Jacobian is kept in the state solve while each correction is smaller than the last by this factor.
FAST_CONTRACTION = 0.2

Fields = tuple[Tensor, Tensor, Tensor]


class ControlProblem:
    """min J(u, z, p) subject to F_i(u_{i-1}, u_i, z_i; p) = 0, u_0 = G(p).

    Args:
        constraint, objective: what the user wrote.
        grid: the time steps and who owns them.
        control_map: z_step = E z; None where the design variables are one control a step.

    Raises:
        InputError: functions that return another shape than (batch, n) or (batch,).
    """

    def __init__(
        self,
        constraint: TimeDependentConstraint,
        objective: Objective,
        grid: TimeGrid,
        control_map: ControlMap | None = None,
    ) -> None:
        self.constraint, self.objective, self.grid, self.control_map = (constraint, objective, grid, control_map)
        self.n, self.m, self.param_dim = constraint.state_dim, constraint.control_dim, constraint.param_dim
        if control_map is not None:
            control_map.check(grid, self.m)
        #: entries of this rank: states (and multipliers), controls, global parameters
        self.state_size = grid.n_local * self.n
        self.control_size = grid.n_local * self.m if control_map is None else control_map.n_local
        self.param_size = self.param_dim if grid.is_first else 0
        #: solves with the state Jacobian over all steps, serial or parallel in time
        self.propagator = Propagator(grid)
        self._check_shapes()

    def initial_state(self, p: Tensor) -> Tensor:
        """u_0 = G(p), shape (n,)."""
        return self.constraint.initial_state(p)

    def _check_shapes(self) -> None:
        p = torch.zeros(self.param_dim, dtype=torch.float64)
        u0 = self.initial_state(p)
        _require_tensor("initial_state(p)", u0, (self.n,))
        if not u0.isfinite().all():
            raise InputError("initial_state(p)", "NaN or infinite entries", "finite numbers")
        steps = self.grid.steps.with_parameters(p)
        u, z = u0.expand(len(steps), -1), torch.zeros(len(steps), self.m, dtype=torch.float64)
        rows = len(steps)
        _require_tensor(f"residual of {rows} steps", self.constraint.residual(u, u, z, steps), (rows, self.n))
        _require_tensor(f"objective of {rows} steps", self.objective.value(u, z, steps), (rows,))

    # -- vectors -----------------------------------------------------------------------------------------

    def create_primal(self) -> PETSc.Vec:
        """A zero vector x = [u | z | p]; entries of a rank in this order."""
        return self._create(self.state_size + self.control_size + self.param_size)

    def create_design(self) -> PETSc.Vec:
        """A zero vector of the design variables [z | p]."""
        return self._create(self.control_size + self.param_size)

    def create_multiplier(self) -> PETSc.Vec:
        """A zero vector of states or multipliers, (n_local, n) on each rank."""
        return self._create(self.state_size)

    def create_kkt(self) -> PETSc.Vec:
        """A zero vector [u | z | p | lam]."""
        return self._create(2 * self.state_size + self.control_size + self.param_size)

    def _create(self, local: int) -> PETSc.Vec:
        return PETSc.Vec().createMPI((local, None), comm=self.grid.comm)

    def fields(self, x: PETSc.Vec) -> Fields:
        """Copies of u (n_local, n), of the flat controls, and of p on all ranks. Collective."""
        u, z, p = copy(x).split([self.state_size, self.control_size, self.param_size])
        return u.reshape(-1, self.n), z, self._parameters(p)

    def design_fields(self, design: PETSc.Vec) -> tuple[Tensor, Tensor]:
        """Copies of the flat controls and of p on all ranks. Collective."""
        z, p = copy(design).split([self.control_size, self.param_size])
        return z, self._parameters(p)

    def _parameters(self, p: Tensor) -> Tensor:
        return self.grid.from_first(p if self.grid.is_first else p.new_zeros(self.param_dim))

    def pack(self, x: PETSc.Vec, u: Tensor, z: Tensor, p: Tensor) -> PETSc.Vec:
        """Write u, the flat controls and p into x, and return it."""
        assign(x, u, z, p[: self.param_size])
        return x

    def join(self, u: PETSc.Vec, design: PETSc.Vec) -> PETSc.Vec:
        """A new x = [u | design]."""
        x = self.create_primal()
        with readonly(u) as state, readonly(design) as rest:
            assign(x, state, rest)
        return x

    def split(self, x: PETSc.Vec) -> tuple[PETSc.Vec, PETSc.Vec]:
        """New vectors u and [z | p] with the entries of x."""
        u, design = self.create_multiplier(), self.create_design()
        with readonly(x) as entries:
            assign(u, entries[: self.state_size])
            assign(design, entries[self.state_size :])
        return u, design

    def join_kkt(self, x: PETSc.Vec, lam: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """Write [x | lam] into `out` and return it."""
        with readonly(x) as primal, readonly(lam) as multiplier:
            assign(out, primal, multiplier)
        return out

    def split_kkt(self, k: PETSc.Vec, x: PETSc.Vec, lam: PETSc.Vec) -> None:
        """Write the parts of `k` into x and lam."""
        with readonly(k) as entries:
            start = len(entries) - self.state_size
            assign(x, entries[:start])
            assign(lam, entries[start:])

    def controls(self, z: Tensor) -> Tensor:
        """Flat design controls -> rows a step, (n_local, m). Collective."""
        return (z if self.control_map is None else self.control_map(z)).reshape(self.grid.n_local, self.m)

    def controls_adjoint(self, w: Tensor) -> Tensor:
        """The transpose of `controls`. Collective."""
        return w.reshape(-1) if self.control_map is None else self.control_map.adjoint(w.reshape(-1))

    # -- evaluations -------------------------------------------------------------------------------------

    def at(self, x: PETSc.Vec) -> Linearization:
        """J, F and their derivatives at x; work is done when asked for, once. Collective."""
        free_garbage(self.grid.comm)  # of the linearizations before
        return Linearization(self, x)

    @logged("pdeoptState")
    def solve_state(
        self, design: PETSc.Vec, guess: PETSc.Vec | None = None, jacobian: StepJacobian | None = None
    ) -> PETSc.Vec:
        """The state u(z, p) as a new vector. Collective.

        Newton's method on all steps at once, each linear solve one forward substitution without a loop
        over steps; where it does not contract, the steps are solved one by one.

        Args:
            guess: a state to begin with; default u_i = u_0.
            jacobian: step Jacobians near the solution, from a design nearby; used while they serve.

        Raises:
            SolveFailure: no solution found in some step.
        """
        z, p = self.design_fields(design)
        z, steps = self.controls(z), self.grid.steps.with_parameters(p)
        u0 = self.initial_state(p)
        start = u0.expand(len(steps), -1) if guess is None else copy(guess).reshape(-1, self.n)
        u = self._newton_over_time(u0, start, z, p, jacobian)
        if u is None:
            u = march(self.grid, self.constraint, u0, z, steps)
        out = self.create_multiplier()
        assign(out, u)
        return out

    def constant_state(self, design: PETSc.Vec) -> PETSc.Vec:
        """u_i = u_0 for all i as a new vector: a start where nothing better is known. Collective."""
        _, p = self.design_fields(design)
        out = self.create_multiplier()
        assign(out, self.initial_state(p).expand(self.grid.n_local, -1))
        return out

    def _newton_over_time(
        self, u0: Tensor, u: Tensor, z: Tensor, p: Tensor, jacobian: StepJacobian | None
    ) -> Tensor | None:
        """Newton's method on all steps; a Jacobian is kept while it contracts fast. None where it does not."""
        if self.constraint.pattern is None:
            return None  # matrix-free sweeps are loops: marching costs the same and is safer
        steps, grid = self.grid.steps.with_parameters(p), self.grid
        size, fresh = float("inf"), False
        for _ in range(40):
            u_old = grid.shift(u, u0)
            r = self.constraint.residual(u_old, u, z, steps)
            try:
                if jacobian is None:
                    jacobian, fresh = self.constraint.linearize(u_old, u, z, steps), True
                du = self.propagator.forward(jacobian, -r)
            except SolveFailure:
                return None
            last, size = size, float(grid.max((du.abs() / (1 + u.abs())).amax()))
            if fresh and not size < 2 * last:  # also for NaN
                return None
            if not size < FAST_CONTRACTION * last and not fresh:  # the step of an old Jacobian is not worth taking
                jacobian, size = None, last
                continue
            u = u + du
            if size <= (1e-8 if fresh else 1e-12):  # quadratic with a fresh Jacobian: the next one is about 1e-16
                return u
            jacobian, fresh = (jacobian if size < FAST_CONTRACTION * last < math.inf else None), False
        return None

    @logged("pdeoptAdjoint")
    def solve_adjoint(self, lin: Linearization) -> PETSc.Vec:
        """lam with J_u + F_u' lam = 0 at the linearization, a new vector. Collective."""
        lam = self.propagator.backward(lin.jacobian, -lin.gradient_fields[0])
        out = self.create_multiplier()
        assign(out, lam)
        return out


class Linearization:
    """J, F and their derivatives at a point x = [u | z | p]. Every member is collective.

    Derivatives of the Lagrangian L = J + sum_i lam_i.F_i; vectors are in the layout of x (primal) and of
    the multiplier. The initial map u_0 = G(p) is differentiated through.
    """

    def __init__(self, problem: ControlProblem, x: PETSc.Vec) -> None:
        self.problem = problem
        self.u, self.z, self.p = problem.fields(x)
        grid = problem.grid
        self.steps, self.node_zero = (grid.steps.with_parameters(self.p), grid.node_zero.with_parameters(self.p))
        self.z_step = problem.controls(self.z)
        self.u0 = problem.initial_state(self.p)
        self.u_old = grid.shift(self.u, self.u0)
        self._no_control = self.z_step.new_zeros(1, problem.m)

    @cached_property
    def value(self) -> float:
        """J at the point; NaN where a term is."""
        total = self.problem.objective.value(self.u, self.z_step, self.steps).sum()
        if self.problem.grid.is_first:
            total = total + self.problem.objective.value(self.u0[None], self._no_control, self.node_zero).sum()
        return float(self.problem.grid.sum(total))

    @cached_property
    def residual(self) -> PETSc.Vec:
        """F at the point, in the layout of the multiplier."""
        out = self.problem.create_multiplier()
        assign(out, self.problem.constraint.residual(self.u_old, self.u, self.z_step, self.steps))
        return out

    @cached_property
    def jacobian(self) -> StepJacobian:
        """The step Jacobians of this rank."""
        return self.problem.constraint.linearize(self.u_old, self.u, self.z_step, self.steps)

    @cached_property
    def gradient_fields(self) -> Fields:
        """dJ/du (n_local, n), dJ/dz (flat) and dJ/dp, the latter summed over the ranks."""
        problem = self.problem
        u, z, p = problem.objective.gradient(self.u, self.z_step, self.steps)
        if problem.param_dim and problem.grid.is_first:
            first, _, p_first = problem.objective.gradient(self.u0[None], self._no_control, self.node_zero)
            p = p + p_first + self._initial_pullback(first[0])
        return u, problem.controls_adjoint(z), problem.grid.sum(p)

    @cached_property
    def gradient(self) -> PETSc.Vec:
        """J' at the point, in the layout of x."""
        return self.problem.pack(self.problem.create_primal(), *self.gradient_fields)

    def _initial_pullback(self, w: Tensor) -> Tensor:
        """G'(p)' w, shape (param_dim,)."""
        return vjp(self.problem.constraint.initial_state, (self.p,), w)[0]

    def _initial_direction(self, dp: Tensor) -> Tensor:
        """G'(p) dp, shape (n,)."""
        if not self.problem.param_dim:
            return torch.zeros_like(self.u0)
        return jvp(self.problem.constraint.initial_state, (self.p,), (dp,))

    def _shift(self, du: Tensor, dp: Tensor) -> Tensor:
        return self.problem.grid.shift(du, self._initial_direction(dp))

    def jvp(self, dx: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = F' dx, in the layout of the multiplier."""
        du, dz, dp = self.problem.fields(dx)
        assign(out, self.jacobian.jvp(self._shift(du, dp), du, self.problem.controls(dz), dp))
        return out

    def vjp(self, lam: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = F'^T lam (the transposed Jacobian), in the layout of x."""
        return self.problem.pack(out, *self.vjp_fields(copy(lam).reshape(-1, self.problem.n)))

    def lagrangian_gradient(self, lam: PETSc.Vec) -> PETSc.Vec:
        """J' + F'^T lam, in the layout of x, a new vector."""
        gradient = self.vjp(lam, self.problem.create_primal())
        gradient.axpy(1.0, self.gradient)
        return gradient

    def vjp_fields(self, lam: Tensor) -> Fields:
        """F_u' lam (n_local, n), F_z' lam (flat) and F_p' lam, the latter summed over the ranks."""
        problem = self.problem
        w_old, w_new, w_z, w_p = self.jacobian.vjp(lam)
        following, first = problem.grid.shift_adjoint(w_old)
        if problem.param_dim:
            w_p = problem.grid.sum(w_p + self._initial_pullback(first))
        return w_new + following, problem.controls_adjoint(w_z), w_p

    def hvp(self, lam: PETSc.Vec | None, dx: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = L'' dx with the multiplier `lam`; None leaves the constraint out (Gauss-Newton)."""
        problem, grid = self.problem, self.problem.grid
        du, dz, dp = problem.fields(dx)
        dz = problem.controls(dz)
        h_u, h_z, h_p = problem.objective.hvp(self.u, self.z_step, self.steps, du, dz, dp)
        if lam is not None:
            rows = copy(lam).reshape(-1, problem.n)
            w_old, w_new, w_z, w_p = self.jacobian.hvp(rows, self._shift(du, dp), du, dz, dp)
            following, first = grid.shift_adjoint(w_old)
            h_u, h_z, h_p = h_u + w_new + following, h_z + w_z, h_p + w_p
            if problem.param_dim and grid.is_first:
                h_p = h_p + self._initial_pullback(first) + self._initial_curvature(self.jacobian.vjp(rows)[0][0], dp)
        if problem.param_dim and grid.is_first:
            h_p = h_p + self._node_zero_hvp(dp)
        return problem.pack(out, h_u, problem.controls_adjoint(h_z), grid.sum(h_p))

    def parameter_column(self, lam: Tensor | None, dp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Second derivatives of each step's L_i and the Jacobian F_i in the direction dp, for assembly.

        Returns rows for u_old, u_new and z, the sum for p over the steps of this rank, and rows of F_p dp.
        The path through u_0 = G(p) is left out but for its curvature.
        """
        no_u, no_z = torch.zeros_like(self.u), torch.zeros_like(self.z_step)
        h_u, h_z, h_p = self.problem.objective.hvp(self.u, self.z_step, self.steps, no_u, no_z, dp)
        h_old = no_u
        if lam is not None:
            h_old, w_new, w_z, w_p = self.jacobian.hvp(lam, dp=dp)
            h_u, h_z, h_p = h_u + w_new, h_z + w_z, h_p + w_p
        if self.problem.grid.is_first:
            h_p = h_p + self._node_zero_hvp(dp)
            if lam is not None:
                h_p = h_p + self._initial_curvature(self.jacobian.vjp(lam)[0][0], dp)
        return h_old, h_u, h_z, h_p, self.jacobian.jvp(dp=dp)

    def _initial_curvature(self, w: Tensor, dp: Tensor) -> Tensor:
        """(d/dp G'(p)' w) dp: the curvature of the initial map."""
        G = self.problem.constraint.initial_state
        return jvp(lambda p: vjp(G, (p,), w)[0], (self.p,), (dp,))

    def _node_zero_hvp(self, dp: Tensor) -> Tensor:
        """The Hessian of p -> J_0(G(p), 0; p) times dp; J_0 belongs to rank 0."""
        objective, G = self.problem.objective, self.problem.constraint.initial_state

        def value(p: Tensor) -> Tensor:
            return objective.value(G(p)[None], self._no_control, self.node_zero.with_parameters(p)).sum()

        return jvp(lambda p: gradient(value, p), (self.p,), (dp,))


def _require_tensor(what: str, found: object, shape: tuple[int, ...]) -> None:
    legal = f"a torch tensor of shape {shape} and type float64"
    if not isinstance(found, Tensor):
        raise InputError(what, type(found).__name__, legal)
    if tuple(found.shape) != shape or found.dtype != torch.float64:
        raise InputError(what, f"shape {tuple(found.shape)} and type {found.dtype}", legal)
