"""Solving forward and backward over all time steps, exactly and serially from rank to rank.

The state Jacobian J_u is block lower bidiagonal: A_i on the diagonal, B_i below it. `substitute_forward` and
`substitute_backward` apply its inverse and that of its adjoint; `from_rank_to_rank` is for nonlinear steps. Each sends
one message from rank to rank. (Time-parallel inverses are their siblings.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.core.errors import SolveFailure, agree
from pdeopt.steps.timegrid import TimeGrid


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


def from_rank_to_rank(grid: TimeGrid, u0: Tensor, like: Tensor, sweep: Callable[[Tensor], Tensor]) -> Tensor:
    """States of the steps, each rank's from the last one of the rank before. Collective.

    Args:
        grid: the steps.
        u0: the initial state, (n,).
        like: rows of this rank, (n_local, any).
        sweep: the state before the steps of a rank, (n,) -> their states, (n_local, n).

    Raises:
        SolveFailure: what a rank's sweep raises; on all ranks.
    """
    before = grid.neighbors.receive_before(u0)
    u, failure = _attempt(lambda _: sweep(u0 if before is None else before), like)
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
