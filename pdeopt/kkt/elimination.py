"""States and multipliers of a KKT system as functions of its design variables, by sweeps over time.

With d = [z | p], T = F_u, C = F_d and S = -T^-1 C, the system

    W_uu u + W_ud d + T'lam = g_u,   W_du u + W_dd d + C'lam = g_d,   T u + C d = c

has u = T^-1 (c - C d) and lam = T^-T (g_u - W_uu u - W_ud d). What is left is H d = r with the reduced Hessian
H = W_dd + W_du S + S'W_ud + S'W_uu S, of the size of the design. It asks nothing of the constraint but its own solves:
no sparsity, no price of a state. (L. T. Biegler, O. Ghattas, M. Heinkenschloss, B. van Bloemen Waanders, Large-Scale
PDE-Constrained Optimization, Springer, 2003, chapter 1.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.core.arrays import assign, copy
from pdeopt.kkt.operator import KKTOperator


class Eliminated(NamedTuple):
    """u and lam, (n_local, n) each, for a design, and what the design misses of its own equation, flat entries."""

    state: Tensor
    multiplier: Tensor
    rest: Tensor


class Elimination:
    """(d, g, c) -> (u, lam, g_d - W_du u - W_dd d - C'lam), a sweep forward and one backward. Collective.

    Args:
        operator: at a point; its fixed design variables are left out.

    Raises:
        SolveFailure: of a call, where a step is singular; on all ranks.

    Example:
        The right-hand side and a product of the reduced Hessian, and the solution for a design:

            r = eliminate(zero, g, c).rest
            Hd = -eliminate(d).rest
            u, lam, rest = eliminate(d, g, c)                         # rest is r - H d
    """

    def __init__(self, operator: KKTOperator) -> None:
        self.operator, self.problem = operator, operator.problem
        layout = self.problem.layout
        self._x, self._w, self._c = layout.create_primal(), layout.create_primal(), layout.create_multiplier()

    def __call__(self, design: Tensor, g: PETSc.Vec | None = None, c: Tensor | None = None) -> Eliminated:
        """See the class.

        Args:
            design: d, the flat entries of this rank, (design_size,).
            g: right-hand side of the primal rows; None for zero.
            c: right-hand side of F' dx, (n_local, n); None for zero.
        """
        fixed, layout = self.operator.fixed, self.problem.layout
        free = design if fixed is None else torch.where(fixed, 0.0, design)
        u = self.state(free, c)
        assign(self._x, u, free)
        w = self.operator.apply_hessian(self._x, self._w)
        w.scale(-1.0)
        if g is not None:
            w.axpy(1.0, g)
        states, rest = copy(w).split([layout.state_size, layout.design_size])
        lam = self.multiplier(states.reshape(u.shape))
        rest = self.design_part(rest, lam)
        if fixed is not None:
            given = 0.0 if g is None else copy(g)[layout.state_size :]
            rest = torch.where(fixed, given - self.operator.pin * design, rest)
        return Eliminated(u, lam, rest)

    def state(self, design: Tensor, c: Tensor | None = None) -> Tensor:
        """T^-1 (c - C d), (n_local, n)."""
        layout, lin = self.problem.layout, self.operator.lin
        assign(self._x, torch.zeros(layout.state_size, dtype=torch.float64), design)
        driven = layout.rows(lin.jvp(self._x, self._c))
        return self._sweep(self.problem.propagator.forward, -driven if c is None else c - driven)

    def multiplier(self, states: Tensor) -> Tensor:
        """T^-T of rows, (n_local, n)."""
        return self._sweep(self.problem.propagator.backward, states)

    def design_part(self, rest: Tensor, lam: Tensor) -> Tensor:
        """rest - C'lam, flat entries of this rank."""
        _, z, p = self.operator.lin.vjp_fields(lam)
        return rest - torch.cat([z, p[: self.problem.layout.param_size]])

    def _sweep(self, solve: Callable[[StepJacobian, Tensor], Tensor], rows: Tensor) -> Tensor:
        """No sweep is needed for nothing, as for the first state of a feasible point."""
        if float(self.problem.grid.max(rows.abs().amax())) == 0.0:
            return torch.zeros_like(rows)
        return solve(self.operator.lin.jacobian, rows)
