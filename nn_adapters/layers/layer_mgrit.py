"""States and gradients of a chain of network steps by MGRIT, as one function of autograd.

    u_i = step(u_{i-1}, z_i; p),  i = 1..N:   controls z_i, one row a step, and shared parameters p

Forward, the states are found under `no_grad`; the last run through the intervals is remembered. Backward, the adjoint

    w_{i-1} = (d step / du)' w_i + g_{i-1},   dJ/dz_i = (d step / dz_i)' w_i,   dJ/dp = sum_i (d step / dp)' w_i

goes through the same intervals, and its last run gives the gradients. Coarse steps take the controls of the middle
step of their interval, and a longer dt (S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger,
Layer-parallel training of deep residual neural networks, SIAM J. Math. Data Sci. 2, 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nn_adapters.layers.layerstep import LayerStep, StepLength
from pdeopt.steps.mgrit import Mgrit, MgritSettings, whole_intervals
from pdeopt.steps.timegrid import TimeGrid


class LayerMgrit:
    """MGRIT for the states of a chain of steps and for their adjoints, over the ranks of a communicator.

    Args:
        num_steps, Tf: N steps over the time Tf, dt = Tf / N.
        comm: a PETSc or mpi4py communicator. Each rank has whole intervals of steps on every level.
        settings: levels, factors, cycles and tolerance.

    Attributes:
        grid: the distribution of the steps over the ranks.
        factors: the coarsening factor of each level but the coarsest.
        forward, adjoint: the solvers; their `cycles` may be changed between calls.
        residuals: relative residuals of the last forward and adjoint solve, where a tolerance asks for them.

    Raises:
        InputError: coarsening factors below 2, or fewer intervals than ranks.
    """

    def __init__(self, num_steps: int, Tf: float, comm: Any, settings: MgritSettings) -> None:
        self.settings, self.factors = settings, settings.factors(num_steps)
        uniform = TimeGrid.uniform(num_steps, Tf, comm)
        offsets = whole_intervals(num_steps, self.factors, uniform.mpi.size)
        self.grid = TimeGrid(uniform.times, comm, offsets)
        self.forward, self.adjoint = self._solvers()
        self.dt = [_common(grid.steps.dt) for grid in self.forward.grids]
        self.residuals: tuple[list[float], list[float]] = ([], [])
        self.guess: Tensor | None = None

    def _solvers(self) -> tuple[Mgrit, Mgrit]:
        forward, adjoint = (Mgrit(self.grid, self.factors, self.settings, adjoint) for adjoint in (False, True))
        return forward, adjoint

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Inside, go one step after the other, on the same ranks: nothing is approximated."""
        kept = self.factors, self.forward, self.adjoint, self.guess
        self.factors, self.guess = [], None
        self.forward, self.adjoint = self._solvers()
        try:
            yield
        finally:
            self.factors, self.forward, self.adjoint, self.guess = kept

    def step_length(self, level: int, rows: slice) -> StepLength:
        """dt of these steps of a level: a number if all steps are alike."""
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


def _common(dt: Tensor) -> StepLength:
    return float(dt[0]) if bool((dt - dt[0]).abs().max() <= 1e-12 * dt[0].abs()) else dt


def solve_layers(
    mgrit: LayerMgrit,
    step: LayerStep,
    u0: Tensor,
    controls: Sequence[Tensor],
    shared: Sequence[Tensor] = (),
    trajectory: bool = False,
) -> tuple[Tensor, Tensor]:
    """u_N, and the states after the steps of this rank, with gradients by u_0, controls and shared parameters.

    Collective, and so is the backward pass. Gradients of u_0 and of shared parameters are equal on all ranks.

    Args:
        mgrit: the solver.
        step: of the chain.
        u0: the state before the first step, equal on all ranks.
        controls: those of the steps of this rank, (n_local, ...) each.
        shared: equal on all ranks.
        trajectory: whether the states are asked for.

    Returns:
        u_N, on all ranks, and the states (n_local, ...), or an empty tensor.

    Raises:
        RuntimeError: in a second backward pass through the same states.
    """
    words = mgrit, step, trajectory, len(controls)
    return _LayerSolve.apply(*words, u0, *controls, *shared)  # type: ignore[no-any-return,no-untyped-call]


class _LayerSolve(torch.autograd.Function):
    """See `solve_layers`; `count` of the tensors are controls, the rest is shared."""

    @staticmethod
    def forward(
        ctx: Any, mgrit: LayerMgrit, step: LayerStep, trajectory: bool, count: int, u0: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solve for the states."""
        shared = tensors[count:]
        levels = [
            step.linearize(controls, shared, lambda rows, level=level: mgrit.step_length(level, rows))  # type: ignore[misc]
            for level, controls in enumerate(mgrit.coarsen(tensors[:count]))
        ]
        states = u0.new_empty((mgrit.grid.n_local, *u0.shape)) if trajectory else u0.new_empty(0)
        wanted = any(ctx.needs_input_grad)

        def final(u: Tensor, rows: slice) -> Tensor:
            value = levels[0].remember(u, rows) if wanted else levels[0].advance(u, rows)
            if trajectory:
                states[rows] = value
            return value

        guess = mgrit.guess if mgrit.settings.start == "warm" else None
        if guess is not None and guess.shape[1:] != u0.shape:
            guess = None
        with torch.no_grad():
            outcome = mgrit.forward.solve([level.advance for level in levels], u0, guess=guess, final=final)
        mgrit.guess = outcome.points if levels[1:] else None
        mgrit.residuals = (outcome.residuals, [])
        ctx.mgrit, ctx.levels, ctx.count, ctx.trajectory = mgrit, levels, count, trajectory
        ctx.adjoint, ctx.factors = mgrit.adjoint, mgrit.factors  # as they are now: `one_by_one` replaces them
        ctx.points = mgrit.forward.departures(outcome.points, u0) if wanted and levels[1:] else None
        return mgrit.last_to_all(outcome.ends[-1]), states

    @staticmethod
    def backward(ctx: Any, w: Tensor, w_states: Tensor) -> tuple[Any, ...]:
        """Solve for the adjoint; the gradients of u_0, controls and shared parameters."""
        mgrit, levels, count = ctx.mgrit, ctx.levels, ctx.count
        if levels is None:
            raise RuntimeError(
                "backward a second time through layer-parallel steps: their states were freed, as "
                "retain_graph does not reach them; evaluate the network again"
            )
        states = ctx.points
        for level in range(1, len(levels)):
            levels[level].states = states
            states = None if level == len(levels) - 1 else states[:: ctx.factors[level]]
        fine = levels[0]
        of_controls = [torch.zeros_like(z) for z in fine.controls]
        of_shared = [torch.zeros_like(p) for p in fine.shared]

        def final(w: Tensor, rows: slice) -> Tensor:
            found = fine.gradients(w, rows)
            for all_rows, g in zip(of_controls, found[1 : 1 + count]):
                all_rows[rows] = g
            for total, g in zip(of_shared, found[1 + count :]):
                total += g
            before: Tensor = found[0]
            return before

        with torch.no_grad():
            g = _sources(mgrit, w_states) if ctx.trajectory else None
            entry = w if g is None else w + mgrit.last_to_all(w_states[-1])
            outcome = ctx.adjoint.solve([level.pullback for level in levels], entry, g, final=final)
            mgrit.residuals = (mgrit.residuals[0], outcome.residuals)
            first = mgrit.first_to_all(outcome.ends[0])
            of_shared = [_sum(mgrit, total) for total in of_shared]
        ctx.levels = levels = None
        return (None, None, None, None, first, *of_controls, *of_shared)


def _sources(mgrit: LayerMgrit, w: Tensor) -> Tensor:
    """What enters the adjoint where each step arrives, at its first node: the cotangent of the state before it."""
    before = mgrit.grid.neighbors.exchange(w[-1], toward=+1)
    return torch.cat([(torch.zeros_like(w[0]) if before is None else before)[None], w[:-1]])


def _sum(mgrit: LayerMgrit, total: Tensor) -> Tensor:
    """The sum over ranks."""
    if mgrit.grid.mpi.size == 1:
        return total
    buffer = total.cpu().contiguous()
    result = torch.empty_like(buffer)
    mgrit.grid.mpi.Allreduce(buffer.numpy(), result.numpy())
    return result.to(total.device)
