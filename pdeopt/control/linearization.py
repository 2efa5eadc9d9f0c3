"""J, F and their derivatives at a point, for vectors of all steps, and what is left of them without the states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy as copy_of
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.controlmap import StepControls
from pdeopt.control.objective import Objective, Rows, Sum
from pdeopt.control.propagator import Propagator
from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.core.arrays import assign
from pdeopt.core.autodiff import gradient, jvp, vjp
from pdeopt.functions.curved import CurvedTerm
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.linear_mgrit import EXACT_RTOL
from pdeopt.steps.timegrid import Steps
from pdeopt.steps.vectorlayout import Fields, VectorLayout


class InitialNode:
    """The node t_0: its state u_0 = G(p), and its term J_0(G(p), 0; p) of the objective.

    Args:
        state: G, (param_dim,) -> (n,).
        objective: its terms; that of step 0 is J_0.
        node: t_0 as a step of length 0; no step where it does not count.
        m: controls of a step.
    """

    def __init__(self, state: Callable[[Tensor], Tensor], objective: Objective, node: Steps, m: int) -> None:
        self.state, self.objective, self.node = state, objective, node
        self._no_control = torch.zeros(1, m, dtype=torch.float64)
        self._last: tuple[Tensor, Tensor] | None = None

    def jvp(self, p: Tensor, dp: Tensor) -> Tensor:
        """G'(p) dp, shape (n,)."""
        return jvp(self.state, (p,), (dp,)) if len(p) else torch.zeros_like(self.state(p))

    def vjp(self, p: Tensor, w: Tensor) -> Tensor:
        """G'(p)' w, shape (param_dim,)."""
        return vjp(self.state, (p,), w)[0]

    def curvature(self, p: Tensor, w: Tensor, dp: Tensor) -> Tensor:
        """(d/dp G'(p)' w) dp, shape (param_dim,)."""
        return jvp(lambda q: self.vjp(q, w), (p,), (dp,))

    def value(self, p: Tensor) -> Tensor:
        """J_0(G(p), 0; p), a scalar."""
        u0 = self.state(p)
        if len(p):
            return self._value(u0, p)
        if self._last is None or not torch.equal(self._last[0], u0):  # the same for all controls
            self._last = u0.clone(), self._value(u0, p)
        return self._last[1]

    def _value(self, u0: Tensor, p: Tensor) -> Tensor:
        if not len(self.node):
            return u0.new_zeros(())
        return self.objective.value(u0[None], self._no_control, self.node.with_parameters(p)).sum()

    def gradient(self, p: Tensor) -> Tensor:
        """The gradient of `value`, shape (param_dim,)."""
        if not len(self.node):
            return torch.zeros_like(p)
        du, _, dp = self.objective.gradient(self.state(p)[None], self._no_control, self.node.with_parameters(p))
        return dp + self.vjp(p, du[0])

    def hvp(self, p: Tensor, dp: Tensor) -> Tensor:
        """The Hessian of `value` times dp, shape (param_dim,)."""
        if not len(self.node):
            return torch.zeros_like(dp)
        return jvp(lambda q: gradient(self.value, q), (p,), (dp,))


class Linearization:
    """J, F and their derivatives at a point x = [u | z | p]. Every member is collective.

    Derivatives of the Lagrangian L = J + sum_i lam_i.F_i; vectors are in the layout of x (primal) and of
    the multiplier. The initial map u_0 = G(p) is differentiated through. `ControlProblem.at` makes it; it is a value:
    linearizations at several points live side by side, and each evaluates what it is asked for once.

    Args:
        constraint, objective: F and the J_i.
        initial: G and J_0; J_0 is counted on rank 0.
        layout: of the vectors.
        controls: flat design controls -> controls of steps.
        x: the point, which is copied.
        stretches: rows that J is evaluated for at once, one after the other; default all.

    Attributes:
        u, z, p: the fields of x: rows (n_local, n), flat controls, global parameters.
        u0, u_old, z_step: G(p), (n,); the states before the steps, (n_local, n); their controls, (n_local, m).
        steps: the steps of this rank at p.

    Example:
        >>> lin = problem.at(x)
        >>> lin.value, lin.residual.norm()
        >>> lin.hvp(lam, dx, out)                  # out = L'' dx
    """

    def __init__(
        self,
        constraint: TimeDependentConstraint,
        objective: Objective,
        initial: InitialNode,
        layout: VectorLayout,
        controls: StepControls,
        x: PETSc.Vec,
        stretches: Sequence[slice] | None = None,
    ) -> None:
        self.constraint, self.objective, self.initial = constraint, objective, initial
        self.layout, self.controls, self.grid = layout, controls, layout.grid
        self.u, self.z, self.p = layout.fields(x)
        self.steps = self.grid.steps.with_parameters(self.p)
        self.z_step, self.u0 = controls(self.z), initial.state(self.p)
        self.u_old = self.grid.shift(self.u, self.u0)
        self.stretches = stretches or [slice(None)]
        self._starts_at_p = bool(layout.param_dim) and self.grid.is_first  # step 1's u_old depends on p

    def with_objective(self, objective: Objective) -> Linearization:
        """The same point and equations with another objective; the step Jacobians are shared.

        The term J_0 of the initial node stays that of the problem.
        """
        other = copy_of(self)
        other.jacobian = self.jacobian
        other.objective = objective
        for name in ("value", "gradient_fields", "gradient", "objective_blocks"):
            other.__dict__.pop(name, None)
        return other

    @cached_property
    def value(self) -> float:
        """J at the point; NaN where a term is."""
        parts = ((self.u[rows], self.z_step[rows], self.steps[rows]) for rows in self.stretches)
        total = torch.stack([self.objective.value(*part).sum() for part in parts]).sum()
        return float(self.grid.sum(total + self.initial.value(self.p) if self.grid.is_first else total))

    @cached_property
    def residual(self) -> PETSc.Vec:
        """F at the point, in the layout of the multiplier."""
        out = self.layout.create_multiplier()
        known = self.__dict__.get("jacobian")
        if known is not None and "residual" in known.__dict__:
            assign(out, known.residual)
        else:  # here alone: kept, it would be there twice
            assign(out, self.constraint.residual(self.u_old, self.u, self.z_step, self.steps))
        return out

    @cached_property
    def jacobian(self) -> StepJacobian:
        """The step Jacobians of this rank."""
        return self.constraint.linearize(self.u_old, self.u, self.z_step, self.steps)

    @cached_property
    def gradient_fields(self) -> Fields:
        """dJ/du (n_local, n), dJ/dz (flat) and dJ/dp, the latter summed over the ranks."""
        u, z, p = self.objective.gradient(self.u, self.z_step, self.steps)
        if self._starts_at_p:
            p = p + self.initial.gradient(self.p)
        return u, self.controls.adjoint(z), self.grid.sum(p)

    @cached_property
    def objective_blocks(self) -> tuple[InnerProduct, InnerProduct]:
        """The state and the control block of each step's Hessian of J, see `Objective.hessian_blocks`."""
        return self.objective.hessian_blocks(self.u, self.z_step, self.steps)

    @cached_property
    def gradient(self) -> PETSc.Vec:
        """J' at the point, in the layout of x."""
        return self.layout.pack(self.layout.create_primal(), *self.gradient_fields)

    def jvp(self, dx: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = F' dx, in the layout of the multiplier."""
        du, dz, dp = self.layout.fields(dx)
        assign(out, self.jacobian.jvp(self.old_direction(du, dp), du, self.controls(dz), dp))
        return out

    def old_direction(self, du: Tensor, dp: Tensor) -> Tensor:
        """du_{i-1} at row i, with du_0 = G'(p) dp."""
        return self.grid.shift(du, self.initial.jvp(self.p, dp) if len(dp) else None)

    def vjp(self, lam: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = F'^T lam (the transposed Jacobian), in the layout of x."""
        return self.layout.pack(out, *self.vjp_fields(self.layout.rows(lam)))

    def vjp_fields(self, lam: Tensor) -> Fields:
        """F_u' lam (n_local, n), F_z' lam (flat) and F_p' lam, the latter summed over the ranks."""
        w_old, w_new, w_z, w_p = _rows_vjp(self, lam)
        following, first = self.grid.shift_adjoint(w_old)
        if self.layout.param_dim:
            w_p = self.grid.sum(w_p + self.initial.vjp(self.p, first))
        return w_new + following, self.controls.adjoint(w_z), w_p

    def lagrangian_gradient(self, lam: PETSc.Vec) -> PETSc.Vec:
        """J' + F'^T lam, in the layout of x, a new vector."""
        parts = zip(self.gradient_fields, self.vjp_fields(self.layout.rows(lam)))
        return self.layout.pack(self.layout.create_primal(), *(one + other for one, other in parts))

    def hvp(self, lam: PETSc.Vec | None, dx: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = L'' dx with the multiplier `lam`; None leaves the constraint out (Gauss-Newton)."""
        rows = None if lam is None else self.layout.rows(lam)
        return self.layout.pack(out, *self.hvp_fields(rows, *self.layout.fields(dx)))

    def hvp_fields(self, lam: Tensor | None, du: Tensor, dz: Tensor, dp: Tensor) -> Fields:
        """L'' times rows du (n_local, n), flat controls dz and dp, with rows of the multiplier; see `hvp`."""
        dz = self.controls(dz)
        if self.objective.is_quadratic:
            state, control = self.objective_blocks
            h_u, h_z, h_p = state.multiply(du), control.multiply(dz), torch.zeros_like(dp)
        else:
            product = self.objective.hvp if lam is not None else partial(gauss_newton, self.objective)
            h_u, h_z, h_p = product(self.u, self.z_step, self.steps, du, dz, dp)
        if lam is not None:
            w_old, w_new, w_z, w_p = self.jacobian.hvp(lam, self.old_direction(du, dp), du, dz, dp)
            h_u, h_z, h_p = _plus(h_u, w_new), _plus(h_z, w_z), _plus(h_p, w_p)
            if self._starts_at_p:
                h_p = h_p + _initial_curvature(self, lam, dp)
            if w_old is not None:
                following, first = self.grid.shift_adjoint(w_old)
                h_u, h_p = h_u + following, h_p + self.initial.vjp(self.p, first) if self._starts_at_p else h_p
        if self._starts_at_p:
            h_p = h_p + self.initial.hvp(self.p, dp)
        return h_u, self.controls.adjoint(h_z), self.grid.sum(h_p)


def gauss_newton(objective: Objective, *at: Any) -> Rows:
    """`Objective.hvp`, of terms that know more without second derivatives of what they are convex functions of."""
    if isinstance(objective, Sum):
        parts = [gauss_newton(term, *at) for term in objective.terms]
        u, z, p = (reduce(torch.add, part) for part in zip(*parts))
        return u, z, p
    found: Rows = objective.gauss_newton(*at) if isinstance(objective, CurvedTerm) else objective.hvp(*at)
    return found


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def parameter_column(
    lin: Linearization, lam: Tensor | None, dp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Second derivatives of each step's L_i and the Jacobian F_i in the direction dp, for assembly.

    Returns rows for u_old, u_new and z, the sum for p over the steps of this rank, and rows of F_p dp.
    The path through u_0 = G(p) is left out but for its curvature.
    """
    no_u, no_z = torch.zeros_like(lin.u), torch.zeros_like(lin.z_step)
    h_u, h_z, h_p = lin.objective.hvp(lin.u, lin.z_step, lin.steps, no_u, no_z, dp)
    h_old = no_u
    if lam is not None:
        w_old, w_new, w_z, w_p = lin.jacobian.hvp(lam, dp=dp)
        h_old, h_u, h_z, h_p = _plus(h_old, w_old), _plus(h_u, w_new), _plus(h_z, w_z), _plus(h_p, w_p)
    if lin._starts_at_p:
        h_p = h_p + lin.initial.hvp(lin.p, dp)
        if lam is not None:
            h_p = h_p + _initial_curvature(lin, lam, dp)
    return h_old, h_u, h_z, h_p, lin.jacobian.jvp(dp=dp)


def _initial_curvature(lin: Linearization, lam: Tensor, dp: Tensor) -> Tensor:
    """The curvature of the initial map in L: that of B_1' lam_1 . G."""
    return lin.initial.curvature(lin.p, lin.jacobian.vjp(lam)[0][0], dp)


def _rows_vjp(lin: Linearization, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F_i' lam_i, as `StepJacobian.vjp` has it; of several stretches without their Jacobian, unless it is there."""
    if len(lin.stretches) == 1 or "jacobian" in lin.__dict__:
        return lin.jacobian.vjp(lam)
    w_old, w_new, w_z = (torch.empty_like(x) for x in (lin.u, lin.u, lin.z_step))
    w_p = torch.zeros_like(lin.p)
    for rows in lin.stretches:
        point = lin.u_old[rows], lin.u[rows], lin.z_step[rows], lin.steps[rows]
        w_old[rows], w_new[rows], w_z[rows], part = StepJacobian(lin.constraint, *point).vjp(lam[rows])
        w_p = w_p + part
    return w_old, w_new, w_z, w_p


class Eliminated(NamedTuple):
    """u and lam, (n_local, n) each, for a design, and what the design misses of its own equation, (design_size,)."""

    state: Tensor
    multiplier: Tensor
    rest: Tensor


class Elimination:
    """(d, g, c) -> (u, lam, g_d - W_du u - W_dd d - C'lam), a sweep forward and one backward. Collective.

    States and multipliers of a linearized problem as functions of its design variables: with d = [z | p], T = F_u,
    C = F_d and S = -T^-1 C, the system

        W_uu u + W_ud d + T'lam = g_u,   W_du u + W_dd d + C'lam = g_d,   T u + C d = c

    has u = T^-1 (c - C d) and lam = T^-T (g_u - W_uu u - W_ud d). What is left is H d = r with the reduced Hessian
    H = W_dd + W_du S + S'W_ud + S'W_uu S, of the size of the design. It asks nothing of the constraint but its own
    solves: no sparsity, no price of a state. (L. T. Biegler, O. Ghattas, M. Heinkenschloss, B. van Bloemen Waanders,
    Large-Scale PDE-Constrained Optimization, Springer, 2003, chapter 1.)

    Designs are flat tensors [z | p] with the entries of this rank, (design_size,).

    Args:
        lin: gives F'.
        propagator: T^-1 and T^-T.
        hessian: W, (u, z, p) -> (u, z, p), as `VectorLayout.fields` has them.

    Attributes:
        rtol: relative residual to which sweeps are done where the propagator iterates.

    Raises:
        SolveFailure: of a call, where a step is singular; on all ranks.

    Example:
        The right-hand side and a product of the reduced Hessian, and the solution for a design:

            r = eliminate(zero, g, c).rest
            Hd = -eliminate(d).rest
            u, lam, rest = eliminate(d, g, c)                         # rest is r - H d
    """

    def __init__(self, lin: Linearization, propagator: Propagator, hessian: Callable[..., Fields]) -> None:
        self.lin, self.propagator, self.hessian = lin, propagator, hessian
        self.rtol = EXACT_RTOL

    def __call__(self, design: Tensor, g: Fields | None = None, c: Tensor | None = None) -> Eliminated:
        """See the class.

        Args:
            design: d.
            g: right-hand side of the primal rows; None for zero.
            c: right-hand side of F' dx, (n_local, n); None for zero.
        """
        z, p = self._fields(design)
        u = self.state(design, c)
        w_u, w_z, w_p = self.hessian(u, z, p)
        rest_u, rest_z, rest_p = (-w_u, -w_z, -w_p) if g is None else (g[0] - w_u, g[1] - w_z, g[2] - w_p)
        del w_u, w_z  # of all steps, as what follows
        lam = self.multiplier(rest_u)
        return Eliminated(u, lam, self.design_part(rest_z, rest_p, lam))

    def state(self, design: Tensor, c: Tensor | None = None) -> Tensor:
        """T^-1 (c - C d), (n_local, n)."""
        lin, (z, p) = self.lin, self._fields(design)
        old = lin.old_direction(torch.zeros_like(lin.u), p) if len(p) else None
        r = -lin.jacobian.jvp(old, None, lin.controls(z), p)
        if c is not None:
            r += c
            if not float(lin.grid.max(r.any().double())):
                return r  # no sweep is needed for nothing, as at a feasible point
        return self.propagator.forward(lin.jacobian, r, self.rtol)

    def multiplier(self, states: Tensor) -> Tensor:
        """T^-T of rows, (n_local, n)."""
        return self.propagator.backward(self.lin.jacobian, states, self.rtol)

    def design_part(self, rest_z: Tensor, rest_p: Tensor, lam: Tensor) -> Tensor:
        """The fields of a design less C'lam, flat."""
        lin = self.lin
        if not lin.layout.param_dim:
            return rest_z - lin.controls.adjoint(lin.jacobian.control_vjp(lam))
        _, z, p = lin.vjp_fields(lam)
        return torch.cat([rest_z - z, (rest_p - p)[: lin.layout.param_size]])

    def _fields(self, design: Tensor) -> tuple[Tensor, Tensor]:
        layout = self.lin.layout
        z, p = design.split([layout.control_size, layout.param_size])
        return z, layout.on_all_ranks(p)
