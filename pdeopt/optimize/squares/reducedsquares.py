"""Objectives that are sums of squares, and the reduced one as a `ResidualFunction`: for Levenberg-Marquardt.

    J(u(z, p), z, p) = |r(z, p)|^2,    r = (w_i / 2)^1/2 L'(B u_i - d_i), (dt alpha / 2)^1/2 L'z_i, ...,   M = LL'

A product with r' is a sweep over time forward, one with its transpose a sweep backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.control.linearization import Elimination, Linearization
from pdeopt.control.objective import ControlCost, Objective, Sum, TerminalLoss, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.autodiff import jvp, plainly, vjp
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.functions.smooth import Costs
from pdeopt.squares.residual import ResidualFunction
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import Steps

#: Components of which a mass that is not diagonal is factored.
MOST_FACTORED = 2000


class TerminalSquares(TerminalLoss):
    """|r(u_N, p)|^2: squares of the last state and the global parameters, as in the prior of parameters.

    Args:
        residual: r, a function of u_N, (n,), and p, (param_dim,), to (k,), by torch functions.

    Example:
        >>> prior = TerminalSquares(lambda u, p: (0.5 * beta / h) ** 0.5 * torch.diff(p))        # beta/2 |p_x|^2
    """

    def __init__(self, residual: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not callable(residual):
            raise InputError("residual", type(residual).__name__, "a function of u_N and p")
        super().__init__(lambda u, p: residual(u, p).square().sum())
        self.residual = residual


class ReducedSquares(ResidualFunction):
    """The reduced objective of a control or inverse problem as a sum of squares, by its products; see above.

    f is J, the same as that of `ReducedObjective`, and Hessian products are exact ones; what is added are r and the
    products with r', of one sweep each. A design whose state cannot be solved for has infinite residuals.

    Args:
        problem: whose objective is a sum of `Tracking`, `ControlCost` and `TerminalSquares`; on one rank.

    Raises:
        InputError: another term of the objective, more ranks, or few checkpoints.

    Example:
        >>> result = LevenbergMarquardt(ReducedSquares(problem)).minimize(torch.zeros(problem.param_dim))
    """

    has_products = True

    def __init__(self, problem: ControlProblem) -> None:
        if problem.grid.mpi.size > 1:
            raise InputError("ranks of a reduced sum of squares", problem.grid.mpi.size, "1; or another solver")
        self.problem, self.reduced = problem, ReducedObjective(problem)
        if self.reduced.sweeps is not None:
            raise InputError("-reduced_checkpoints", "a sum of squares, which needs all states at once", "0")
        size = problem.layout.design_size
        u = problem.initial_state(torch.zeros(problem.param_dim, dtype=torch.float64)).expand(problem.grid.n_local, -1)
        z = torch.zeros(problem.grid.n_local, problem.m, dtype=torch.float64)
        p = torch.zeros(problem.param_dim, dtype=torch.float64)
        rows = len(self._rows(u, z, p, u[0]))
        super().__init__(size, rows, costs=Costs(0.5, 1.0, 1.0, 0.5 * min(rows, size), 0.5))
        self._point = torch.empty(0)

    def _rows(self, u: Tensor, z: Tensor, p: Tensor, u0: Tensor) -> Tensor:
        """r, (m,), of states, controls of steps, parameters, and the first state."""
        problem = self.problem
        steps, node = problem.grid.steps.with_parameters(p), problem.grid.node_zero.with_parameters(p)
        parts = [rows_of(problem.objective, u, z, steps).flatten()]
        if len(node):
            parts.insert(0, rows_of(problem.objective, u0[None], torch.zeros_like(z[:1]), node).flatten())
        return torch.cat(parts)

    def _at(self, x: Tensor) -> tuple[Linearization, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The linearization, and what r is a function of."""
        lin = self.reduced.linearization(x)
        return lin, (lin.u, lin.z_step, lin.p, lin.u0)

    @plainly
    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        try:
            r = self._rows(*self._at(x)[1])
        except SolveFailure:
            r = torch.full((self.rows,), torch.inf, dtype=torch.float64)
        return r if rows is None else r[rows]

    @plainly
    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        lin, (u, z, p, u0) = self._at(x)
        du = Elimination(lin, self.problem.propagator, lin.hvp_fields).state(d)
        dz, dp = d.split([lin.layout.control_size, lin.layout.param_size])
        objective, steps = self.problem.objective, self.problem.grid.steps.with_parameters(p)
        parts = [_rows_along(objective, u, steps, du, lin.controls(dz), dp).flatten()]
        if len(node := self.problem.grid.node_zero.with_parameters(p)):
            first = lin.initial.jvp(p, dp)[None]
            parts.insert(0, _rows_along(objective, u0[None], node, first, torch.zeros_like(z[:1]), dp).flatten())
        found = torch.cat(parts)
        return found if rows is None else found[rows]

    @plainly
    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        lin, point = self._at(x)
        w = w if rows is None else w.new_zeros(self.rows).index_add(0, rows, w)
        by_u, by_z, by_p, by_first = vjp(self._rows, point, w)
        eliminate = Elimination(lin, self.problem.propagator, lin.hvp_fields)
        if len(lin.p):
            by_p = by_p + lin.initial.vjp(lin.p, by_first)
        return eliminate.design_part(lin.controls.adjoint(by_z), by_p, eliminate.multiplier(by_u))

    @plainly
    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r, count = self._residual(x, rows), self._count(rows)
        if count < self.size:
            units = torch.eye(count, dtype=torch.float64)
            return r, torch.stack([self._vjp(x, unit, rows) for unit in units]) if count else r.new_zeros(0, self.size)
        return r, torch.stack([self._jvp(x, unit, rows) for unit in torch.eye(self.size, dtype=torch.float64)], 1)

    def _value(self, x: Tensor) -> float:
        return self.reduced._value(x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self.reduced._value_and_gradient(x)

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.reduced._hvp(x, d)


def rows_of(objective: Objective, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
    """Rows whose squares sum to the objective's term of each step, (batch, k); differentiable by torch.

    Args:
        objective: the terms.
        u, z, steps: as in `Objective.value`.

    Raises:
        InputError: a term that is no sum of squares.
    """
    if isinstance(objective, Sum):
        return torch.cat([rows_of(term, u, z, steps) for term in objective.terms], dim=1)
    if isinstance(objective, Tracking):
        e, _ = objective._error(u, steps)
        return (0.5 * objective.measurements.weight(steps)).sqrt()[:, None] * _rooted(objective.mass, e)
    if isinstance(objective, ControlCost):
        return (0.5 * objective.control_weight * steps.dt).sqrt()[:, None] * _rooted(objective.mass, z)
    if isinstance(objective, TerminalSquares):
        found = objective.residual(u[-1], steps.p).reshape(1, -1)
        others = found.new_zeros(len(steps) - steps.has_last, found.shape[1])
        return torch.cat([others, found]) if steps.has_last else others
    legal = "Tracking, ControlCost, TerminalSquares, and sums of them"
    raise InputError("term of a sum of squares", type(objective).__name__, legal)


def _rows_along(objective: Objective, u: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Tensor:
    """The derivative of `rows_of` along a direction, (batch, k); all terms but `TerminalSquares` are linear."""
    if isinstance(objective, Sum):
        return torch.cat([_rows_along(term, u, steps, du, dz, dp) for term in objective.terms], dim=1)
    if isinstance(objective, Tracking):
        seen = objective._seen(du)
        kept = objective.measurements.kept_at(steps, seen.shape[-1])
        seen = seen if kept is None else kept * seen
        return (0.5 * objective.measurements.weight(steps)).sqrt()[:, None] * _rooted(objective.mass, seen)
    if isinstance(objective, ControlCost):
        return (0.5 * objective.control_weight * steps.dt).sqrt()[:, None] * _rooted(objective.mass, dz)
    assert isinstance(objective, TerminalSquares)
    found: Tensor = jvp(objective.residual, (u[-1], steps.p), (du[-1], dp)).reshape(1, -1)
    others = found.new_zeros(len(steps) - steps.has_last, found.shape[1])
    return torch.cat([others, found]) if steps.has_last else others


def _rooted(mass: StepMatrix | None, e: Tensor) -> Tensor:
    """Rows L'e with M = LL', (batch, k)."""
    if mass is None:
        return e
    root = _root(mass)
    return e * root if root.ndim == 1 else e @ root


@lru_cache(maxsize=8)
def _root(mass: StepMatrix) -> Tensor:
    """L, (k, k), or its diagonal, (k,)."""
    M: Any = mass.as_csr("mass of a sum of squares")
    diagonal = M.diagonal()
    if M.nnz == np.count_nonzero(diagonal):
        return torch.from_numpy(np.sqrt(diagonal))
    if M.shape[0] > MOST_FACTORED:
        got, legal = f"{M.shape[0]} components", f"a diagonal one, or up to {MOST_FACTORED} components"
        raise InputError("mass of a sum of squares", got, legal)
    w, V = np.linalg.eigh(M.toarray())
    return torch.from_numpy(V * np.sqrt(np.clip(w, 0.0, None)))
