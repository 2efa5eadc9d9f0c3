"""States and gradients of a chain of network steps by MGRIT, as one function of autograd.

    u_i = step(u_{i-1}, z_i; p),  i = 1..N:   controls z_i, one row a step, and shared parameters p

Forward, the states are found under `no_grad`; the last run through the intervals is remembered. Backward, the adjoint

    w_{i-1} = (d step / du)' w_i + g_{i-1},   dJ/dz_i = (d step / dz_i)' w_i,   dJ/dp = sum_i (d step / dp)' w_i

goes through the same intervals, and its last run gives the gradients. What long steps are on coarse levels, and their
controls, is in `coarsening` (S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger,
Layer-parallel training of deep residual neural networks, SIAM J. Math. Data Sci. 2, 2020).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch import Tensor

from nn_adapters.layers.coarsening import ROUGH, coarse_controls, roughness
from nn_adapters.layers.layerstep import LayerStep, StepLength
from nn_adapters.layers.parts.context import (
    SERIAL,
    autocast_state,
    communicator_name,
    outside_compilation,
    refuse_transforms,
    sum_over_ranks,
)
from nn_adapters.layers.parts.costs import mgrit_cost, serial_cost
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import IntervalMap, Mgrit, MgritSettings, StepMap
from pdeopt.steps.timegrid import TimeGrid, as_bytes, host_rows
from pdeopt.steps.transfer import whole_intervals

#: A solve whose last run misses its C-points by more than half of their size has diverged. In training that goes well
#: they are missed by less than a twentieth.
LARGEST_MISFIT = 0.5


class Solvers(NamedTuple):
    """Of states and of adjoints, and the coarsening factor of each level but the coarsest."""

    forward: Mgrit
    adjoint: Mgrit
    factors: list[int]


class LayerMgrit:
    """MGRIT for the states of a chain of steps and for their adjoints, over the ranks of a communicator.

    A copy is on the same communicator; pickled, it comes back on `MPI.COMM_WORLD` or on one process alone.

    Args:
        num_steps, Tf: N steps over the time Tf, dt = Tf / N.
        comm: a PETSc or mpi4py communicator. Each rank has whole intervals of the finest steps.
        settings: levels, factors, cycles and tolerance.

    Attributes:
        grid: the distribution of the steps over the ranks.
        factors: the coarsening factor of each level but the coarsest.
        forward, adjoint: the solvers; their `cycles` may be changed between calls.
        exact: solvers that go one step after the other, on the same ranks.
        residuals: relative residuals of the last forward and adjoint solve, where a tolerance asks for them.
        shortest: dt of a layer.
        roughness: of the controls of the last solve, see `coarsening.roughness`.
        stages: evaluations of a layer in a long step.
        seen: numbers in a state of the last call, and the shapes of a layer's weights.
        is_serial: whether to go one step after the other from now on.
        repeats: solves that diverged, and were repeated one step after the other.
        misfits: of the C-points of the last forward and adjoint solve, see `Outcome`.

    Raises:
        InputError: coarsening factors below 2, or fewer intervals than ranks; when pickled, a communicator of some of
            several ranks; when read, another number of ranks.
    """

    def __init__(self, num_steps: int, Tf: float, comm: Any, settings: MgritSettings) -> None:
        self.settings = settings
        factors, uniform = settings.factors(num_steps), TimeGrid.uniform(num_steps, Tf, comm)
        offsets = whole_intervals(num_steps, factors, uniform.mpi.size)
        self.grid = TimeGrid(uniform.times, comm, offsets)
        self.forward, self.adjoint, self.factors = self._solvers(factors)
        self.exact = self._solvers([])
        self.dt = [0.0 if grid is None else _common(grid.steps.dt) for grid in self.forward.grids]
        self.shortest = float(self.grid.steps.dt.max())
        self.roughness, self.stages = 0.0, 1
        self.seen: tuple[int, Sequence[torch.Size]] = (0, [])
        self.is_serial, self.repeats = False, 0
        self.residuals: tuple[list[float], list[float]] = ([], [])
        self.misfits = (0.0, 0.0)
        self.guess: Tensor | None = None
        self._has_warned = False

    def _solvers(self, factors: list[int]) -> Solvers:
        forward, adjoint = (Mgrit(self.grid, factors, self.settings, adjoint) for adjoint in (False, True))
        return Solvers(forward, adjoint, factors)

    @property
    def solvers(self) -> Solvers:
        """Those that serve now."""
        return Solvers(self.forward, self.adjoint, self.factors)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerMgrit:
        new = copy.copy(self)
        new.forward, new.adjoint = copy.copy(self.forward), copy.copy(self.adjoint)
        new.guess = None if self.guess is None else self.guess.clone()
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        grid, cycles = self.grid, (self.forward.cycles, self.adjoint.cycles, self.is_serial)
        where = (communicator_name(grid.mpi), grid.begin, grid.end)
        return _rebuild, (grid.num_steps, float(grid.times[-1]), self.settings, where, cycles)

    def look(self, u0: Tensor, parameters: Sequence[Tensor], is_shared: bool = False) -> None:
        """Take note, before a solve, of how much a layer has to do.

        Args:
            u0: a state.
            parameters: of the layers, (layers, ...) each, or those that all layers share.
            is_shared: which of the two.
        """
        self.seen = u0.numel(), [p.shape if is_shared else p.shape[1:] for p in parameters]

    def is_dear(self) -> bool:
        """Whether the cycles, on this one rank, have no less to do than one layer after the other, by counts."""
        is_alone = self.grid.mpi.size == 1 and self.settings.serial == "auto"
        return bool(self.factors) and is_alone and mgrit_cost(self) >= serial_cost(self)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Inside, go one step after the other, on the same ranks: nothing is approximated."""
        kept = self.solvers
        self.forward, self.adjoint, self.factors = self.exact
        try:
            yield
        finally:
            self.forward, self.adjoint, self.factors = kept

    def warm(self, u0: Tensor) -> Tensor | None:
        """The C-points of the last solve, where the settings start there and the states are alike."""
        guess = self.guess if self.settings.start == "warm" else None
        alike = guess is not None and (guess.shape[1:], guess.dtype, guess.device) == (u0.shape, u0.dtype, u0.device)
        return guess if alike else None

    def warn_of_divergence(self, which: str, misfit: float, exact: Tensor) -> None:
        """Warn, once, where cycles went astray and an exact solve did not, so that the input is not to blame."""
        self.guess, self.repeats = None, self.repeats + 1
        if self._has_warned or self.grid.mpi.rank > 0 or not bool(exact.isfinite().all()):
            return
        self._has_warned = True
        warnings.warn(
            f"the {which} cycles over {self.grid.num_steps} layers diverged (relative misfit {misfit:.1e}); such "
            "solves are repeated one layer after the other: right, but slow. Try more cycles (-layer_mgrit_cycles), a "
            "smaller -layer_mgrit_coarsening, or smaller first weights",
            RuntimeWarning,
            stacklevel=3,
        )

    def coarse_controls(self, controls: Sequence[Tensor], may_be_means: bool) -> list[list[Tensor]]:
        """Those of coarse levels: in the middle of intervals, or means where they are smooth enough. Collective."""
        if may_be_means:
            self.roughness = roughness(controls, self.factors[0], self.grid.mpi)
        with torch.no_grad():
            means = may_be_means and self.roughness < ROUGH
            return coarse_controls(controls, self.factors, means, self.forward.moves)[1:]

    def step_length(self, level: int, rows: slice) -> StepLength:
        """dt of these steps of a level: a number if all steps are alike."""
        dt = self.dt[level]
        return dt if isinstance(dt, float) else dt[rows]

    def last_to_all(self, state: Tensor) -> Tensor:
        """`state` of the last rank on all ranks. Collective."""
        return self._from(state, self.grid.mpi.size - 1)

    def first_to_all(self, state: Tensor) -> Tensor:
        """`state` of rank 0 on all ranks. Collective."""
        return self._from(state, 0)

    def _from(self, state: Tensor, rank: int) -> Tensor:
        if self.grid.mpi.size == 1:
            return state
        buffer = host_rows(state).copy_(state.detach())
        self.grid.mpi.Bcast(as_bytes(buffer), rank)
        return buffer.to(state.device, non_blocking=True)


def _rebuild(
    num_steps: int, Tf: float, settings: MgritSettings, where: tuple[str, int, int], cycles: tuple[int, int, bool]
) -> LayerMgrit:
    """The solver that was pickled."""
    name, begin, end = where
    found = LayerMgrit(num_steps, Tf, getattr(MPI, name), settings)
    if (found.grid.begin, found.grid.end) != (begin, end):
        own = f"{found.grid.begin + 1} to {found.grid.end}"
        raise InputError("pickled layers", f"{begin + 1} to {end} for a rank that has {own}", "as many ranks as then")
    found.forward.cycles, found.adjoint.cycles, found.is_serial = cycles
    return found


def _common(dt: Tensor) -> StepLength:
    return float(dt[0]) if bool((dt - dt[0]).abs().max() <= 1e-12 * dt[0].abs()) else dt


@outside_compilation
def solve_layers(
    mgrit: LayerMgrit,
    step: LayerStep,
    u0: Tensor,
    controls: Sequence[Tensor],
    shared: Sequence[Tensor] = (),
    trajectory: bool = False,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """u_N, and the states after the steps of this rank, with gradients by u_0, controls and shared parameters.

    Collective, and so is the backward pass. Gradients of u_0 and of shared parameters are equal on all ranks. Where
    the cycles diverge, a solve is repeated one step after the other, with a warning. A second backward pass, under
    `retain_graph`, evaluates once more.

    Args:
        mgrit: the solver.
        step: of the chain.
        u0: the state before the first step, equal on all ranks.
        controls: those of the steps of this rank, (n_local, ...) each.
        shared: equal on all ranks.
        trajectory: whether the states are asked for.
        exact: whether to go one step after the other.

    Returns:
        u_N, on all ranks, and the states (n_local, ...), or an empty tensor.

    Raises:
        InputError: inside a transform of `torch.func`.
        RuntimeError: a backward pass with `create_graph`, or a second one without `retain_graph`.
    """
    refuse_transforms()
    solvers = mgrit.exact if exact or mgrit.is_serial else mgrit.solvers
    autocast = autocast_state(u0.device.type)
    call = _LayerCall(mgrit, solvers, step, trajectory, len(controls), torch.is_grad_enabled(), autocast)
    found: tuple[Tensor, Tensor] = _LayerSolve.apply(call, u0, *controls, *shared)  # type: ignore[no-untyped-call]
    if call.misfit > LARGEST_MISFIT:
        found = _LayerSolve.apply(call.exact(), u0, *controls, *shared)  # type: ignore[no-untyped-call]
        mgrit.warn_of_divergence("forward", call.misfit, found[0])
    return found


@dataclass
class _LayerCall:
    """What a solve needs besides tensors, and the misfit that it leaves.

    `solvers` are those of the call: others may serve when its backward pass comes, or in another thread. `count` of the
    tensors are controls, the rest is shared. `grad` and `autocast` are as they were set.
    """

    mgrit: LayerMgrit
    solvers: Solvers
    step: LayerStep
    trajectory: bool
    count: int
    grad: bool
    autocast: dict[str, Any]
    misfit: float = 0.0

    def exact(self) -> _LayerCall:
        """The same call, one step after the other."""
        return replace(self, solvers=self.mgrit.exact, misfit=0.0)

    def levels(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The steps of each level, finest first."""
        controls, shared, factors = tensors[: self.count], tensors[self.count :], self.solvers.factors
        lengths = [partial(self.mgrit.step_length, level) for level in range(1 + len(factors))]
        levels: list[Any] = [self.step.linearize(controls, shared, lengths[0])]
        if factors:
            long = self.step.over_intervals(self.mgrit.shortest)
            self.mgrit.stages = 1 + int(self.step is not long)
            may_be_means = self.step is not long and long.takes_means
            for rows, dt in zip(self.mgrit.coarse_controls(controls, may_be_means), lengths[1:]):
                levels.append(long.linearize(rows, shared, dt))
        return levels


class _LayerSolve(torch.autograd.Function):
    """See `solve_layers`."""

    @staticmethod
    def forward(ctx: Any, call: _LayerCall, u0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for the states."""
        mgrit, solver, levels = call.mgrit, call.solvers.forward, call.levels(tensors)
        states = u0.new_empty((mgrit.grid.n_local, *u0.shape)) if call.trajectory else u0.new_empty(0)
        wanted, is_coarse = call.grad and any(ctx.needs_input_grad), len(levels) > 1

        phis = [level.advance for level in levels]
        final: StepMap = levels[0].remember if wanted else levels[0].advance
        if levels[0].intervals is not None:
            inside = levels[0].intervals
            phis[0] = IntervalMap(phis[0], inside.advance)
            final = IntervalMap(final, inside.remember if wanted else inside.advance)
        if call.trajectory:
            final = partial(_kept, states, final)

        with torch.no_grad(), torch.autocast(**call.autocast):
            guess = mgrit.warm(u0) if is_coarse else None
            outcome = solver.solve(phis, u0, guess=guess, final=final)
        if is_coarse:
            mgrit.guess = outcome.points
        call.misfit, mgrit.residuals, mgrit.misfits = outcome.misfit, (outcome.residuals, []), (outcome.misfit, 0.0)
        ctx.call, ctx.levels = call, levels
        ctx.points = solver.departures(outcome.points, u0) if wanted and is_coarse else None
        ctx.save_for_backward(u0, *tensors)
        return mgrit.last_to_all(outcome.ends[-1]), states

    @staticmethod
    def backward(ctx: Any, w: Tensor, w_states: Tensor) -> tuple[Any, ...]:
        """Solve for the adjoint; the gradients of u_0, controls and shared parameters."""
        refuse_transforms(w, w_states)
        if torch.is_grad_enabled():
            raise RuntimeError(f"create_graph=True through parallel layers has no second derivatives; use {SERIAL}")
        call, tensors = ctx.call, ctx.saved_tensors
        if ctx.levels is None:  # a second time: the states of the first were freed
            return _anew(call, tensors, w, w_states)
        with torch.no_grad(), torch.autocast(**call.autocast):
            found, misfit = _adjoint(ctx, w, w_states)
        ctx.levels = None
        if misfit > LARGEST_MISFIT:
            _, *found = _anew(call.exact(), tensors, w, w_states)
            call.mgrit.warn_of_divergence("adjoint", misfit, found[0])
        return (None, *found)


def _kept(states: Tensor, step: StepMap, u: Tensor, rows: slice) -> Tensor:
    """The states after these steps, which are kept in `states`, too."""
    states[rows] = value = step(u, rows)
    return value


def _adjoint(ctx: Any, w: Tensor, w_states: Tensor) -> tuple[list[Tensor], float]:
    """The gradients at the states that the forward solve remembers, and the misfit."""
    mgrit, levels, count = ctx.call.mgrit, ctx.levels, ctx.call.count
    _, adjoint, factors = ctx.call.solvers
    states = ctx.points
    for level in range(1, len(levels)):
        (levels[level].states,) = adjoint.moves[level].there([states])
        states = None if level == len(levels) - 1 else levels[level].states[:: factors[level]]
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

    def through(w: Tensor, m: int) -> Tensor:
        before, *found = fine.intervals.gradients(w, m)
        for all_rows, g in zip(of_controls, found):
            all_rows.copy_(g)
        return before

    phis, last = [level.pullback for level in levels], final
    if fine.intervals is not None:
        phis[0], last = IntervalMap(phis[0], fine.intervals.pullback), IntervalMap(final, through)
    g = _sources(mgrit, w_states) if ctx.call.trajectory else None
    entry = w if g is None else w + mgrit.last_to_all(w_states[-1])
    outcome = adjoint.solve(phis, entry, g, final=last)
    mgrit.residuals = (mgrit.residuals[0], outcome.residuals)
    mgrit.misfits = (mgrit.misfits[0], outcome.misfit)
    first = mgrit.first_to_all(outcome.ends[0])
    of_shared = [sum_over_ranks(mgrit.grid.mpi, total) for total in of_shared]
    return [first, *of_controls, *of_shared], outcome.misfit


def _anew(call: _LayerCall, tensors: Sequence[Tensor], w: Tensor, w_states: Tensor) -> tuple[Any, ...]:
    """The gradients from an evaluation of their own, by the solvers as they are now."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        end, states = _LayerSolve.apply(replace(call, grad=True), *leaves)  # type: ignore[no-untyped-call]
    outputs = ([end, states], [w, w_states]) if call.trajectory else ([end], [w])
    return (None, *torch.autograd.grad(outputs[0], leaves, outputs[1]))


def _sources(mgrit: LayerMgrit, w: Tensor) -> Tensor:
    """What enters the adjoint where each step arrives, at its first node: the cotangent of the state before it."""
    before = mgrit.grid.neighbors.exchange(w[-1], toward=+1)
    return torch.cat([(torch.zeros_like(w[0]) if before is None else before)[None], w[:-1]])
