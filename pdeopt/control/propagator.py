"""Solves with the state Jacobian and its adjoint over all steps, serial or parallel in time: `-propagator`.

J_u is block lower bidiagonal: A_i on the diagonal, B_i below it. `serial` is substitution from rank to rank, with one
message each: `substitute_forward` and `substitute_backward`; `from_rank_to_rank` is the same for nonlinear steps.
`mgrit` repeats the cycles of `linear_mgrit` until what is left is rounding: as exact, and all ranks work at once. Where
less is asked for, it takes fewer cycles, and substitution fewer iterations of the Krylov methods inside the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pdeopt.control.stepjacobian import SparseStepJacobian, StepJacobian
from pdeopt.core.errors import InputError, SolveFailure, agree
from pdeopt.core.settings import Settings, read, setting
from pdeopt.steps.linear_mgrit import EXACT_RTOL, LinearMgrit, LinearMgritSettings
from pdeopt.steps.matrices.krylov import loosened
from pdeopt.steps.stepsolve import is_krylov
from pdeopt.steps.timegrid import TimeGrid


@dataclass(frozen=True)
class PropagatorSettings(Settings):
    """Linear systems over all steps, in state and adjoint solves."""

    propagator: str = setting(
        "serial",
        "solver of state and adjoint equations: one step after the other, or MGRIT cycles until they are exact",
        choices=("serial", "mgrit"),
        reads={"mgrit": (LinearMgritSettings,)},
    )


class Propagator:
    """J_u^-1 and J_u^-T on the rows of a grid, to rounding or to a tolerance. Every verb is collective.

    Args:
        grid: the steps.
        settings: default those of the options.

    Example:
        >>> du = problem.propagator.forward(lin.jacobian, -r)          # J_u du = -r
        >>> lam = problem.propagator.backward(lin.jacobian, -J_u)      # the adjoint equation
        >>> du = problem.propagator.forward(lin.jacobian, -r, 1e-3)    # by a few cycles, where it iterates
    """

    def __init__(self, grid: TimeGrid, settings: PropagatorSettings | None = None) -> None:
        self.grid, self.settings = grid, settings or read(PropagatorSettings)
        self._mgrit_settings = (
            LinearMgritSettings() if self.settings.propagator == "serial" else read(LinearMgritSettings)
        )
        self._cycles_of: WeakKeyDictionary[StepJacobian, LinearMgrit] = WeakKeyDictionary()

    def is_exact(self, jacobian: StepJacobian) -> bool:
        """Whether a tolerance would save nothing: substitution by factors does all the work anyhow."""
        by_factors = not (isinstance(jacobian, SparseStepJacobian) and is_krylov(jacobian.blocks["A"]))
        return self._is_serial and by_factors

    @property
    def _is_serial(self) -> bool:
        return self.settings.propagator == "serial"

    def forward(self, jacobian: StepJacobian, r: Tensor, rtol: float = EXACT_RTOL) -> Tensor:
        """J_u^-1 r.

        Args:
            jacobian: the step Jacobians of this rank.
            r: rows, (n_local, n).
            rtol: the residual, relative to |r|, that is small enough.

        Returns:
            (n_local, n).

        Raises:
            SolveFailure: a step is singular, or MGRIT does not converge; on all ranks.
            InputError: MGRIT for a constraint without a sparsity pattern.
        """
        if self._is_serial:
            with loosened(rtol):  # of each step
                return substitute_forward(self.grid, jacobian, r)
        return self._cycles(jacobian).solve(r, rtol)

    def backward(self, jacobian: StepJacobian, r: Tensor, rtol: float = EXACT_RTOL) -> Tensor:
        """J_u^-T r; arguments and errors as of `forward`."""
        if self._is_serial:
            with loosened(rtol):
                return substitute_backward(self.grid, jacobian, r)
        return self._cycles(jacobian).solve_adjoint(r, rtol)

    def _cycles(self, jacobian: StepJacobian) -> LinearMgrit:
        """With their factors, kept as long as somebody has the Jacobian."""
        if not isinstance(jacobian, SparseStepJacobian):
            raise InputError(
                "-propagator mgrit",
                f"{type(jacobian.constraint).__name__} without a sparsity pattern",
                "a constraint with a pattern, or -propagator serial",
            )
        if jacobian not in self._cycles_of:
            A, B = jacobian.blocks["A"], jacobian.blocks["B"]
            self._cycles_of[jacobian] = LinearMgrit(self.grid, A, B, self._mgrit_settings)
        return self._cycles_of[jacobian]


# -- serial -------------------------------------------------------------------------------------------------


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
