"""States and gradients of a chain of network steps by MGRIT, as one function of autograd.

    u_i = step(u_{i-1}, z_i; p),  i = 1..N:   controls z_i, one row a step, and shared parameters p

Forward, the states are found under `no_grad`; the last run through the intervals is remembered. Backward, the
adjoint goes through the same intervals, and its last run gives the gradients. Coarse steps take the controls of the
middle step of their interval, and a longer dt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.steps.mgrit import Mgrit, MgritSettings, whole_intervals
from pdeopt.steps.timegrid import TimeGrid

#: step(u, z, p, dt): rows of states and of controls -> rows of states; dt a number, or one a row.
Step = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Any], Tensor]


class Hierarchy:
    """The steps of a network on all levels, distributed over ranks.

    Args:
        num_steps, Tf: N steps over the time Tf.
        comm: a PETSc or mpi4py communicator.
        settings: of MGRIT.
    """

    def __init__(self, num_steps: int, Tf: float, comm: Any, settings: MgritSettings) -> None:
        self.settings, self.factors = settings, settings.factors(num_steps)
        uniform = TimeGrid.uniform(num_steps, Tf, comm)
        offsets = whole_intervals(num_steps, self.factors, uniform.mpi.size)
        self.grid = TimeGrid(uniform.times, comm, offsets)
        self.forward, self.adjoint = (Mgrit(self.grid, self.factors, settings, adjoint) for adjoint in (False, True))
        self.dt = [_common(grid.steps.dt) for grid in self.forward.grids]
        self.residuals: tuple[list[float], list[float]] = ([], [])  # of the last solves, forward and adjoint
        self.guess: Tensor | None = None

    def begin_exact(self) -> None:
        """Go one step after the other, on the same ranks, until `end_exact`."""
        self._kept = self.factors, self.forward, self.adjoint, self.guess
        self.factors, self.guess = [], None
        self.forward, self.adjoint = (Mgrit(self.grid, [], self.settings, adjoint) for adjoint in (False, True))

    def end_exact(self) -> None:
        """Go on in parallel."""
        self.factors, self.forward, self.adjoint, self.guess = self._kept

    def steps(self, level: int, rows: slice) -> Any:
        """dt of these steps: a number if all are alike."""
        dt = self.dt[level]
        return dt if isinstance(dt, float) else dt[rows]

    def coarsen(self, controls: Sequence[Tensor]) -> list[list[Tensor]]:
        """The controls on each level, those of the step in the middle of each interval."""
        levels = [list(controls)]
        for factor in self.factors:
            levels.append([_middles(control, factor) for control in levels[-1]])
        return levels

    def last_to_all(self, state: Tensor) -> Tensor:
        """`state` of the last rank on all ranks. Collective."""
        return self._from(state, self.grid.mpi.size - 1)

    def first_to_all(self, state: Tensor) -> Tensor:
        """`state` of rank 0 on all ranks. Collective."""
        return self._from(state, 0)

    def _from(self, state: Tensor, rank: int) -> Tensor:
        if self.grid.mpi.size == 1:
            return state
        buffer = state.detach().cpu().contiguous().clone()
        self.grid.mpi.Bcast(buffer.numpy(), rank)
        return buffer.to(state.device)


def _middles(rows: Tensor, factor: int) -> Tensor:
    """The row in the middle of each interval, of second order where rows are smooth; the last of a shorter interval."""
    middles = rows[factor // 2 :: factor]
    return middles if len(middles) * factor >= len(rows) else torch.cat([middles, rows[-1:]])


def _common(dt: Tensor) -> float | Tensor:
    return float(dt[0]) if bool((dt - dt[0]).abs().max() <= 1e-12 * dt[0].abs()) else dt


@dataclass
class Pieces:
    """Where the step was evaluated, for the derivatives there: leaves of autograd and the value."""

    leaves: list[Tensor]
    value: Tensor


class Linearized:
    """The steps of one level at their states; rows that are asked for together are differentiated together."""

    def __init__(self, step: Step, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], Any]):
        self.step, self.controls, self.shared, self.dt = step, controls, shared, dt
        self.states: Tensor | None = None  # before each step; the finest level is remembered piece by piece instead
        self.pieces: dict[tuple[Any, Any, Any], Any] = {}

    def advance(self, u: Tensor, rows: slice) -> Tensor:
        """The states after these steps."""
        return self.step(u, [z[rows] for z in self.controls], self.shared, self.dt(rows))

    def remember(self, u: Tensor, rows: slice) -> Tensor:
        """`advance`, and stay ready for derivatives there."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (u, *(z[rows] for z in self.controls), *self.shared)]
            count = len(self.controls)
            value = self.step(leaves[0], leaves[1 : 1 + count], leaves[1 + count :], self.dt(rows))
        self.pieces[rows.start, rows.stop, rows.step] = Pieces(leaves, value)
        return value.detach()

    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        """The cotangents of the states before these steps."""
        piece = self._piece(rows)
        return torch.autograd.grad(piece.value, piece.leaves[0], w, retain_graph=True)[0]

    def gradients(self, w: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """The cotangents of state, controls and shared parameters; the piece is freed."""
        piece = self._piece(rows)
        del self.pieces[rows.start, rows.stop, rows.step]
        found = torch.autograd.grad(piece.value, piece.leaves, w, allow_unused=True)
        return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, piece.leaves))

    def _piece(self, rows: slice) -> Pieces:
        key = rows.start, rows.stop, rows.step
        if key not in self.pieces:
            assert self.states is not None
            self.remember(self.states[rows], rows)
        return self.pieces[key]


class Propagation(torch.autograd.Function):
    """u_N on all ranks, and the states after the steps of this rank, from u_0, controls and shared parameters.

    Controls are those of the steps of this rank, shared parameters equal on all ranks; their gradients are, too.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hierarchy: Hierarchy, step: Any, states_too: bool, count: int, u0: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solve for the states; `count` of the tensors are controls, the rest is shared. Collective."""
        shared = tensors[count:]
        make = getattr(step, "linearized", Linearized)
        levels = [
            make(step, controls, shared, lambda rows, level=level: hierarchy.steps(level, rows))
            for level, controls in enumerate(hierarchy.coarsen(tensors[:count]))
        ]
        n = hierarchy.grid.n_local
        states = u0.new_empty((n, *u0.shape)) if states_too else u0.new_empty(0)
        wanted = any(ctx.needs_input_grad)

        def final(u: Tensor, rows: slice) -> Tensor:
            value = levels[0].remember(u, rows) if wanted else levels[0].advance(u, rows)
            if states_too:
                states[rows] = value
            return value

        warm = hierarchy.settings.start == "warm" and hierarchy.guess is not None
        guess = hierarchy.guess if warm and hierarchy.guess.shape[1:] == u0.shape else None  # type: ignore[union-attr]
        with torch.no_grad():
            phis = [level.advance for level in levels]
            outcome = hierarchy.forward.solve(phis, u0, guess=guess, final=final)
        hierarchy.guess = outcome.points if levels[1:] else None
        hierarchy.residuals = (outcome.residuals, [])
        ctx.hierarchy, ctx.levels, ctx.entry, ctx.sizes = hierarchy, levels, u0.shape, (count, len(shared), states_too)
        ctx.adjoint, ctx.factors = hierarchy.adjoint, hierarchy.factors  # those of now
        ctx.points = hierarchy.forward.departures(outcome.points, u0) if wanted and len(levels) > 1 else None
        return hierarchy.last_to_all(outcome.ends[-1]), states

    @staticmethod
    def backward(ctx: Any, w: Tensor, w_states: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Solve for the adjoint; the gradients of u_0, controls and shared parameters. Collective."""
        hierarchy, levels = ctx.hierarchy, ctx.levels
        if levels is None:
            raise RuntimeError(
                "backward a second time through layer-parallel steps: their states were freed, as "
                "retain_graph does not reach them; evaluate the network again"
            )
        count, _, states_too = ctx.sizes
        states = ctx.points
        for level in range(1, len(levels)):
            levels[level].states = states
            states = None if level == len(levels) - 1 else states[:: ctx.factors[level]]
        fine = levels[0]
        rows_of = [torch.zeros_like(z) for z in fine.controls]
        sums = [torch.zeros_like(p) for p in fine.shared]

        def final(w: Tensor, rows: slice) -> Tensor:
            found = fine.gradients(w, rows)
            for all_rows, g in zip(rows_of, found[1 : 1 + count]):
                all_rows[rows] = g
            for total, g in zip(sums, found[1 + count :]):
                total += g
            return found[0]

        with torch.no_grad():
            g = _sources(hierarchy, w_states) if states_too else None
            entry = w if g is None else w + hierarchy.last_to_all(w_states[-1])
            outcome = ctx.adjoint.solve([level.pullback for level in levels], entry, g, final=final)
            hierarchy.residuals = (hierarchy.residuals[0], outcome.residuals)
            first = hierarchy.first_to_all(outcome.ends[0])
            sums = [_sum(hierarchy, total) for total in sums]
        ctx.levels = levels = None
        return (None, None, None, None, first, *rows_of, *sums)


def _sources(hierarchy: Hierarchy, w: Tensor) -> Tensor:
    """What enters the adjoint where each step arrives, at its first node: the cotangent of the state before it."""
    before = hierarchy.grid.neighbor(w[-1], toward=+1)
    return torch.cat([(torch.zeros_like(w[0]) if before is None else before)[None], w[:-1]])


def _sum(hierarchy: Hierarchy, total: Tensor) -> Tensor:
    """The sum over ranks."""
    if hierarchy.grid.mpi.size == 1:
        return total
    buffer = total.cpu().contiguous()
    result = torch.empty_like(buffer)
    hierarchy.grid.mpi.Allreduce(buffer.numpy(), result.numpy())
    return result.to(total.device)
