"""Solving forward and backward over all time steps, exactly and serially from rank to rank.

The state Jacobian J_u is block lower bidiagonal: A_i on the diagonal, B_i below it. `substitute_forward` and
`substitute_backward` apply its inverse and that of its adjoint, `march` solves the nonlinear steps one by one;
each sends one message from rank to rank. (Time-parallel inverses are their siblings.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.core.errors import SolveFailure, agree
from pdeopt.steps.timegrid import Steps, TimeGrid


def substitute_forward(grid: TimeGrid, jacobian: StepJacobian, r: Tensor) -> Tensor:
    """J_u^-1 r by forward substitution. Collective.

    Args:
        grid: the steps.
        jacobian: the step Jacobians of this rank.
        r: rows, (n_local, n).

    Returns:
        (n_local, n).

    Raises:
        SolveFailure: a step of a rank is singular; on all ranks.
    """
    before = grid.neighbors.receive_before(r[0])
    if before is not None:
        r = r - jacobian.jvp(d_old=_only_row(r, 0, before))
    x, failure = _attempt(jacobian.forward_sweep, r)
    grid.neighbors.send_after(x[-1])
    agree(grid.mpi, failure)
    return x


def substitute_backward(grid: TimeGrid, jacobian: StepJacobian, r: Tensor) -> Tensor:
    """J_u^-T r by backward substitution. Collective; arguments and errors as of `substitute_forward`."""
    known = grid.neighbors.receive_after(r[0])  # B_{i+1}' x_{i+1} of the step that follows this slab
    if known is not None:
        r = r - _only_row(r, -1, known)
    x, failure = _attempt(jacobian.backward_sweep, r)
    if not grid.is_first:
        grid.neighbors.send_before(jacobian.vjp(_only_row(x, 0, x[0]))[0][0])
    agree(grid.mpi, failure)
    return x


def march(grid: TimeGrid, constraint: TimeDependentConstraint, u0: Tensor, z: Tensor, steps: Steps) -> Tensor:
    """The states u_1..u_N for controls z, one nonlinear step after the other. Collective.

    Args:
        grid: the steps.
        constraint: whose `advance` solves a step.
        u0: the initial state, (n,).
        z: controls of the steps of this rank, (n_local, m).
        steps: the steps of this rank.

    Returns:
        (n_local, n).

    Raises:
        SolveFailure: a step of a rank has no solution; on all ranks.
    """

    def sweep(z: Tensor) -> Tensor:
        rows, u = [], (u0 if before is None else before).reshape(1, -1)
        for i in range(len(z)):
            u = constraint.advance(u, z[i : i + 1], steps[i : i + 1])
            rows.append(u)
        return torch.cat(rows)

    before = grid.neighbors.receive_before(u0)
    u, failure = _attempt(sweep, z)
    grid.neighbors.send_after(u[-1] if failure is None else torch.full_like(u0, torch.nan))
    agree(grid.mpi, failure)
    return u


def _only_row(like: Tensor, row: int, value: Tensor) -> Tensor:
    rows = torch.zeros_like(like)
    rows[row] = value
    return rows


def _attempt(sweep: Callable[[Tensor], Tensor], r: Tensor) -> tuple[Tensor, SolveFailure | None]:
    """The sweep's result, or NaN and its failure: the chain of messages must not stop half-way."""
    try:
        return sweep(r), None
    except SolveFailure as failure:
        return torch.full_like(r, torch.nan), failure.bare()
