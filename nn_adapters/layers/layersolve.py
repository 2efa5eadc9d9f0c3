"""States and gradients of a chain of network steps by MGRIT, as one function of autograd.

    u_i = step(u_{i-1}, z_i; p),  i = 1..N:   controls z_i, one row a step, and shared parameters p

Forward, the states are found under `no_grad`; the last run through the intervals is remembered. Backward, the adjoint

    w_{i-1} = (d step / du)' w_i + g_{i-1},   dJ/dz_i = (d step / dz_i)' w_i,   dJ/dp = sum_i (d step / dp)' w_i

goes through the same intervals, and its last run gives the gradients. The solver is a `LayerMgrit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nn_adapters.layers.coarsening import ROUGH, coarse_controls, roughness
from nn_adapters.layers.layer_mgrit import LayerMgrit, Solvers
from nn_adapters.layers.parts.context import (
    SERIAL,
    autocast_state,
    gives_numbers,
    is_capturing,
    outside_compilation,
    refuse_transforms,
)
from nn_adapters.layers.parts.costs import layer_work
from nn_adapters.layers.parts.intervalfit import FittedSteps, Watch
from nn_adapters.layers.parts.layerstep import LayerStep, StepLength
from pdeopt.core.errors import InputError
from pdeopt.steps.exchange.parcels import sum_over_ranks
from pdeopt.steps.mgrit import IntervalMap, Outcome, StepMap

#: A solve whose last run misses its C-points by more than half of their size has diverged. In training that goes well
#: they are missed by less than a twentieth.
LARGEST_MISFIT = 0.5


@outside_compilation
def solve_layers(
    mgrit: LayerMgrit,
    step: LayerStep,
    u0: Tensor,
    controls: Sequence[Tensor],
    shared: Sequence[Tensor] = (),
    trajectory: bool = False,
    exact: bool = False,
    learns: bool = True,
) -> tuple[Tensor, Tensor]:
    """u_N, and the states after the steps of this rank, with gradients by u_0, controls and shared parameters.

    Collective, and so is the backward pass. Gradients of u_0 and of shared parameters are equal on all ranks. Where
    the cycles diverge, a solve is repeated one step after the other, with a warning; inside of a CUDA graph it cannot
    be, and `LayerMgrit.misfits` says so after a replay. A second backward pass, under `retain_graph`, evaluates once
    more.

    Args:
        mgrit: the solver.
        step: of the chain.
        u0: the state before the first step, equal on all ranks.
        controls: those of the steps of this rank, (n_local, ...) each.
        shared: equal on all ranks.
        trajectory: whether the states are asked for.
        exact: whether to go one step after the other.
        learns: whether fitted long steps may learn from it, as they do where gradients are asked for.

    Returns:
        u_N, on all ranks, and the states (n_local, ...), or an empty tensor.

    Raises:
        InputError: inside a transform of `torch.func`; in a CUDA graph, layers of several ranks, a tolerance, a solve
            that begins at the last one's states, or fitted long steps.
        RuntimeError: a backward pass with `create_graph`, or a second one without `retain_graph`.
    """
    refuse_transforms()
    solvers = mgrit.exact if exact or mgrit.is_serial else mgrit.solvers
    refuse_in_graph(mgrit, solvers)
    autocast = autocast_state(u0.device.type)
    interval = solvers.factors[0] if learns and mgrit.fit is not None and solvers.factors else 0
    call = _LayerCall(mgrit, solvers, step, trajectory, len(controls), torch.is_grad_enabled(), autocast, interval)
    found: tuple[Tensor, Tensor] = _LayerSolve.apply(call, u0, *controls, *shared)  # type: ignore[no-untyped-call]
    if call.misfit is not None:
        found = _LayerSolve.apply(call.exact(), u0, *controls, *shared)  # type: ignore[no-untyped-call]
        mgrit.warn_of_divergence("forward", call.misfit, found[0])
    return found


@dataclass
class _LayerCall:
    """What a solve needs besides tensors, and the misfit that it leaves where it diverged.

    `solvers` are those of the call: others may serve when its backward pass comes, or in another thread. `count` of the
    tensors are controls, the rest is shared. `grad` and `autocast` are as they were set. `interval` is the number of
    layers in those intervals from which long steps learn, 0 where they learn nothing.
    """

    mgrit: LayerMgrit
    solvers: Solvers
    step: LayerStep
    trajectory: bool
    count: int
    grad: bool
    autocast: dict[str, Any]
    interval: int = 0
    misfit: float | None = None

    def exact(self) -> _LayerCall:
        """The same call, one step after the other."""
        return replace(self, solvers=self.mgrit.exact, misfit=None)

    def levels(self, u0: Tensor, tensors: Sequence[Tensor]) -> list[Any]:
        """The steps of each level, finest first, for states like u0."""
        controls, shared, factors = tensors[: self.count], tensors[self.count :], self.solvers.factors
        lengths = [partial(_step_length, self.mgrit, level, u0.device) for level in range(1 + len(factors))]
        levels: list[Any] = [self.step.linearize(controls, shared, lengths[0])]
        if factors and self.mgrit.fit is not None and self.mgrit.fit.is_ready(u0, self.step.axis):
            self.mgrit.stages = 1 + 2 * u0.shape[self.step.axis] * u0.numel() / max(layer_work(self.mgrit), 1.0)
            first = self.step.linearize([z[:: factors[0]] for z in controls], shared, lengths[0])
            levels.append(FittedSteps(first, self.mgrit.fit, self.step.axis))
        elif factors:
            long = self.step.over_intervals(self.mgrit.shortest)
            self.mgrit.stages = 1 + int(self.step is not long)
            may_be_means = self.step is not long and long.takes_means
            for rows, dt in zip(_coarse_controls(self.mgrit, controls, may_be_means), lengths[1:]):
                levels.append(long.linearize(rows, shared, dt))
        return levels


class _LayerSolve(torch.autograd.Function):
    """See `solve_layers`."""

    @staticmethod
    def forward(ctx: Any, call: _LayerCall, u0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for the states."""
        mgrit, solver, levels = call.mgrit, call.solvers.forward, call.levels(u0, tensors)
        states = u0.new_empty((mgrit.grid.n_local, *u0.shape)) if call.trajectory else u0.new_empty(0)
        wanted, is_coarse = call.grad and any(ctx.needs_input_grad), len(levels) > 1
        watch = Watch(call.interval) if call.interval and wanted else None

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
            outcome = solver.solve(phis, u0, guess=guess, final=final if watch is None else watch.over(final))
        if is_coarse and mgrit.settings.start == "warm":
            mgrit.guess = outcome.points
        call.misfit = _noted(mgrit, outcome, adjoint=False)
        if watch is not None and mgrit.fit is not None and call.misfit is None:  # else its repetition teaches
            mgrit.fit = mgrit.fit.learned(watch.states(outcome.ends), call.step.axis)
        ctx.call, ctx.levels = call, levels
        ctx.points = solver.departures(outcome.points, u0) if wanted and is_coarse else None
        ctx.save_for_backward(u0, *tensors)
        end = mgrit.last_to_all(outcome.ends[-1])
        return end.clone() if end._is_view() else end, states  # autograd lets nobody change a view in place

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
        if misfit is not None:
            _, *found = _anew(call.exact(), tensors, w, w_states)
            call.mgrit.warn_of_divergence("adjoint", misfit, found[0])
        return (None, *found)


def _kept(states: Tensor, step: StepMap, u: Tensor, rows: slice) -> Tensor:
    """The states after these steps, which are kept in `states`, too."""
    states[rows] = value = step(u, rows)
    return value


def _adjoint(ctx: Any, w: Tensor, w_states: Tensor) -> tuple[list[Tensor], float | None]:
    """The gradients at the states that the forward solve remembers, and the misfit where the cycles went astray."""
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
    for total, kept in zip(of_shared, fine.kept_back()):
        total += kept
    first = mgrit.first_to_all(outcome.ends[0])
    of_shared = [sum_over_ranks(mgrit.grid.mpi, total) for total in of_shared]
    return [first, *of_controls, *of_shared], _noted(mgrit, outcome, adjoint=True)


def _anew(call: _LayerCall, tensors: Sequence[Tensor], w: Tensor, w_states: Tensor) -> tuple[Any, ...]:
    """The gradients from an evaluation of their own, by the solvers as they are now."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        end, states = _LayerSolve.apply(replace(call, grad=True, interval=0), *leaves)  # type: ignore[no-untyped-call]
    outputs = ([end, states], [w, w_states]) if call.trajectory else ([end], [w])
    return (None, *torch.autograd.grad(outputs[0], leaves, outputs[1]))


def _sources(mgrit: LayerMgrit, w: Tensor) -> Tensor:
    """What enters the adjoint where each step arrives, at its first node: the cotangent of the state before it."""
    before = mgrit.grid.neighbors.exchange(w[-1], toward=+1)
    return torch.cat([(torch.zeros_like(w[0]) if before is None else before)[None], w[:-1]])


def _noted(mgrit: LayerMgrit, outcome: Outcome, adjoint: bool) -> float | None:
    """Let the solver remember what a solve has left; the misfit where the cycles went astray, else None.

    In a CUDA graph nothing is known yet: the misfit is kept where it is, and whoever replays the graph looks at it.
    """
    misfit: float | Tensor
    if is_capturing() and outcome.gap is not None:
        misfit = outcome.gap
        mgrit.captured.append((adjoint, misfit))
    else:
        misfit = outcome.misfit
    mgrit.gaps = (mgrit.gaps[0], misfit) if adjoint else (misfit, 0.0)
    mgrit.residuals = (mgrit.residuals[0], outcome.residuals) if adjoint else (outcome.residuals, [])
    return misfit if isinstance(misfit, float) and misfit > LARGEST_MISFIT else None


def _coarse_controls(mgrit: LayerMgrit, controls: Sequence[Tensor], may_be_means: bool) -> list[list[Tensor]]:
    """Those of coarse levels: in the middle of intervals, or means where they are smooth enough. Collective."""
    means: bool | Tensor = False
    with torch.no_grad():
        if may_be_means:
            mgrit.rough = rough = roughness(controls, mgrit.factors[0], mgrit.grid.mpi)
            means = rough < ROUGH
            if gives_numbers(means):
                mgrit.rough, means = float(rough), bool(means)
        return coarse_controls(controls, mgrit.factors, means, mgrit.forward.moves)[1:]


def _step_length(mgrit: LayerMgrit, level: int, device: torch.device, rows: slice) -> StepLength:
    """dt of these steps of a level: a number if all steps are alike."""
    dt = mgrit.dt[level]
    if isinstance(dt, float) or device.type == "cpu":
        return dt if isinstance(dt, float) else dt[rows]
    key = level, device
    if key not in mgrit.dt_on:  # brought there once: the memory of the host has no part in a CUDA graph
        mgrit.dt_on[key] = dt.to(device)
    return mgrit.dt_on[key][rows]


def refuse_in_graph(mgrit: LayerMgrit, solvers: Solvers) -> None:
    """Refuse, where a solve is captured as a part of a CUDA graph, what a replay would not do."""
    if not is_capturing():
        return
    what, own = "layers in a CUDA graph", mgrit.settings
    if mgrit.grid.mpi.size > 1:
        raise InputError(what, f"layers on {mgrit.grid.mpi.size} ranks", "those of one rank")
    if solvers.factors and own.rtol > 0:
        raise InputError(what, f"-layer_mgrit_rtol {own.rtol:g}, which ends cycles", "0, which fixes their number")
    if solvers.factors and own.start == "warm":
        raise InputError(what, "-layer_mgrit_start warm, states that Python keeps", "nested | constant")
    if solvers.factors and own.long_steps == "fitted":
        raise InputError(what, "-layer_mgrit_long_steps fitted, which Python teaches", "stages")
