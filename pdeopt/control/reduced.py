"""The reduced objective z -> J(u(z), z): what L-BFGS, trust regions and TAO minimize."""

from __future__ import annotations

import math
from typing import Protocol

from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.problem import ControlProblem, Linearization
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import SolveFailure


class SmoothObjective(Protocol):
    """What an optimizer needs: a value with its gradient, and Hessian products at that point."""

    def value_and_gradient(self, z: PETSc.Vec, g: PETSc.Vec) -> float:
        """J at z; writes the gradient into g."""

    def hvp(self, z: PETSc.Vec, dz: PETSc.Vec, out: PETSc.Vec) -> None:
        """out = J'' dz at z."""


class ReducedObjective:
    """J(u(z, p), z, p) over the design variables [z | p], by adjoints.

    The state solve starts from the state of the last design. A design whose state cannot be solved for
    has the value infinity, which every line search and trust region backs away from.

    Args:
        problem: the control problem.
        gauss_newton: leave the constraint's curvature out of Hessian products.
    """

    def __init__(self, problem: ControlProblem, gauss_newton: bool = False) -> None:
        self.problem, self.gauss_newton = problem, gauss_newton
        self._design = problem.create_design()
        self._state: PETSc.Vec | None = None
        self._lin: Linearization | None = None
        self._multiplier: PETSc.Vec | None = None
        self.values = self.gradients = self.hessian_products = 0

    def value(self, z: PETSc.Vec) -> float:
        """J at z."""
        self.values += 1
        try:
            return self.linearization(z).value
        except SolveFailure:
            return math.inf

    def value_and_gradient(self, z: PETSc.Vec, g: PETSc.Vec) -> float:
        """J at z; writes the gradient into g."""
        value = self.value(z)
        if math.isfinite(value):
            self.gradient(z, g)
        else:
            g.set(0.0)
        return value

    def gradient(self, z: PETSc.Vec, g: PETSc.Vec) -> None:
        """Writes J_z + F_z' lam at z into g."""
        self.gradients += 1
        lin = self.linearization(z)
        _, jz, jp = lin.gradient_fields
        _, fz, fp = lin.vjp_fields(self._rows(self.multiplier(z)))
        assign(g, jz + fz, (jp + fp)[: self.problem.param_size])

    def hvp(self, z: PETSc.Vec, dz: PETSc.Vec, out: PETSc.Vec) -> None:
        """out = J'' dz at z: one forward and one backward sweep (second-order adjoint)."""
        self.hessian_products += 1
        problem, lin = self.problem, self.linearization(z)
        dx = problem.join(problem.create_multiplier(), dz)
        du = problem.propagator.forward(lin.jacobian, -self._rows(lin.jvp(dx, problem.create_multiplier())))
        problem.pack(dx, du, *problem.design_fields(dz))
        w = lin.hvp(None if self.gauss_newton else self.multiplier(z), dx, problem.create_primal())
        w_u, w_z, w_p = problem.fields(w)
        dlam = problem.propagator.backward(lin.jacobian, -w_u)
        _, fz, fp = lin.vjp_fields(dlam)
        assign(out, w_z + fz, (w_p + fp)[: problem.param_size])

    def linearization(self, z: PETSc.Vec) -> Linearization:
        """The problem at (u(z), z); kept until another z is asked for. Raises `SolveFailure`."""
        if not self.is_at(z):
            jacobian = None if self._lin is None else self._lin.jacobian
            self._lin = self._multiplier = None
            state = self.problem.solve_state(z, self._state, jacobian)
            z.copy(self._design)
            self._state = state
            self._lin = self.problem.at(self.problem.join(state, z))
        assert self._lin is not None
        return self._lin

    def is_at(self, z: PETSc.Vec) -> bool:
        """Whether z is the design whose linearization is kept."""
        return self._lin is not None and bool(z.equal(self._design))

    def start_from(self, u: Tensor) -> None:
        """Begin the next state solve with these states, (n_local, n)."""
        self._state = self.problem.create_multiplier()
        assign(self._state, u)

    def state(self, z: PETSc.Vec) -> PETSc.Vec:
        """The state at z, a new vector. Raises `SolveFailure`."""
        self.linearization(z)
        assert self._state is not None
        return self._state.copy()

    def multiplier(self, z: PETSc.Vec) -> PETSc.Vec:
        """The adjoint at z."""
        lin = self.linearization(z)
        if self._multiplier is None:
            self._multiplier = self.problem.solve_adjoint(lin)
        return self._multiplier

    def _rows(self, vec: PETSc.Vec) -> Tensor:
        return copy(vec).reshape(-1, self.problem.n)
