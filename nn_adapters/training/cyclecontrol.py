"""Which cycles a training takes: as few as keep the error of its gradients within what SGD allows, or none at all.

SGD with step lengths a_k and gradients of relative errors b_k converges as exact SGD does if sum a_k b_k is bounded
(as for inexact layer-parallel gradients in S. Lin, 2022). So b_k may be `limit` (1 + k / horizon)^-3/2, whose sum over
any number of batches is below limit (1 + 2 horizon).

Exact gradients are dear, but the last run through the intervals tells for nothing by how much it misses the points that
it began at. Error and misfit fall and grow together; their ratio is measured rarely, by an exact gradient, and serves
until the next time. What is chosen follows counts and misfits, never a clock: a run is the same on any machine. All
ranks choose alike, by the largest of their errors, misfits and costs. The number of ranks enters in one place: where
MGRIT has no less to do than one layer after the other on so many ranks, layers go one after the other, and nothing is
approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.layer_mgrit import LayerMgrit
from nn_adapters.layers.parallelmodule import measure_bias, mgrit_solvers
from nn_adapters.layers.parts.costs import mgrit_cost, serial_cost

#: Batches from the first measurement to the second; the distance doubles up to `every`.
FIRST_WAIT = 25

#: Shares of the allowed error: measured, cycles are added above the first; seen by misfits, one measures again above
#: the second, in the batch that follows; measured below the third, a cycle is taken away.
ENOUGH, MUCH, LITTLE = 0.5, 0.75, 0.05

#: The error of gradients whose solves had to be repeated, or that are not finite.
DIVERGED = 1e9


@dataclass
class GradientBias:
    """The error of a gradient that came from inexact solves.

    Attributes:
        batch: number of the batch, from 1.
        error: relative to the gradient of exact solves, the largest of all groups; `DIVERGED` where the cycles did.
        cycles: forward and adjoint ones that gave it.
        rate: step size with which it entered.
        misfit: of the same solves, forward and adjoint together.
        allowed: what the error may be.
    """

    batch: int
    error: float
    cycles: tuple[int, int]
    rate: float
    misfit: float = 0.0
    allowed: float = math.inf


class CycleControl:
    """Watches the gradients of a network in training and sets the cycles of its solvers.

    Call `before` and `after` each batch; `nna.Training` does. Both are collective over `team`.

    Args:
        network: with parallel modules; without any, all is exact and nothing is done.
        limit: relative error that gradients may have at first; None measures, and leaves the cycles as they are.
        every: batches between measurements, at most; 0 for none, which leaves the cycles as they are.
        horizon: batches after which the error may be a third of that at first.
        team: an mpi4py communicator of all ranks that train together, those with other samples, too; by default that
            of the network's layers.

    Attributes:
        bias: what was measured.
        accumulated: sum a_k b_k so far, b_k from the misfit of each batch.
        gain: the error of gradients relative to the misfit, as last measured; 1 before.
        why_serial: why layers go one after the other; empty where they do not.

    Example:
        >>> control = CycleControl(network, limit=0.1, every=100, horizon=1000)
        >>> for batch, rows in enumerate(batches, start=1):
        ...     control.before(batch, rate, lambda: loss(rows))
        ...     loss(rows).backward()
        ...     control.after(batch, rate)
        ...     optimizer.step()
    """

    def __init__(self, network: nn.Module, limit: float | None, every: int, horizon: int, team: Any = None) -> None:
        self.network, self.limit, self.every, self.horizon = network, limit, every, max(horizon, 1)
        self.solvers = [solver for solver in mgrit_solvers(network) if solver.factors]
        self.team = team or (self.solvers[0].grid.mpi if self.solvers else MPI.COMM_SELF)
        self.bias: list[GradientBias] = []
        self.accumulated, self.gain, self.why_serial = 0.0, 1.0, ""
        self._wait, self._is_due, self._kept = FIRST_WAIT, True, 0
        self._repeats, self._misfits = 0, (0.0, 0.0)

    @property
    def is_active(self) -> bool:
        """Whether there is something to watch."""
        return bool(self.solvers) and self.every > 0 and not self.why_serial

    @property
    def cycles(self) -> tuple[int, int]:
        """Forward and adjoint ones, of the first solver."""
        return self.solvers[0].forward.cycles, self.solvers[0].adjoint.cycles

    def allowed(self, batch: int) -> float:
        """The relative error that the gradient of this batch may have."""
        return math.inf if self.limit is None else self.limit * (1 + batch / self.horizon) ** -1.5

    def bound(self, rate: float) -> float:
        """Of sum a_k b_k over any number of batches, with step lengths of at most `rate`."""
        return math.inf if self.limit is None else rate * self.limit * (1 + 2 * self.horizon)

    def before(self, batch: int, rate: float, loss: Callable[[], Tensor]) -> None:
        """Measure where it is due, and choose cycles. Collective.

        Args:
            batch: number of the batch, from 1.
            rate: its step length.
            loss: evaluates its loss.
        """
        since = batch - self.bias[-1].batch if self.bias else self._wait
        if not self.is_active or not (self._is_due or since >= self._wait):
            self._repeats = count_repeats(self.solvers)
            return
        if self._is_due and self.bias and since < FIRST_WAIT and self.limit is not None:
            self._add_cycle()  # measured a moment ago: the safe side, without another measurement
        else:
            self._choose(batch, rate, loss)
        self._is_due, self._repeats = False, count_repeats(self.solvers)

    def after(self, batch: int, rate: float) -> None:
        """Take note of the misfit that the gradient of a batch has left. Collective.

        Args:
            batch, rate: as for `before`.
        """
        if not self.is_active:
            return
        has_diverged = self._look()
        error = self.gain * sum(self._misfits)
        self.accumulated += rate * error
        self._is_due = has_diverged or error > MUCH * self.allowed(batch)

    def _choose(self, batch: int, rate: float, loss: Callable[[], Tensor]) -> None:
        """Measure, and add cycles until the error is small enough, or try with one less where it is very small."""
        found = self._measure(batch, rate, loss)
        if self.limit is None:
            return
        if not pays(self.solvers, self.team):
            self._go_serial("as many operations as one layer after the other")
        elif found.error == found.misfit == 0.0:  # nothing is approximated, as in a fused chain
            self._wait = min(2 * self._wait, self.every)
        elif found.error > ENOUGH * found.allowed:
            while found.error > ENOUGH * found.allowed and self._add_cycle():
                found = self._measure(batch, rate, loss)
            self._wait = FIRST_WAIT
        elif found.error < LITTLE * found.allowed and can_do_with_less(self.solvers) and batch >= self._kept:
            self._try_less(batch, rate, loss)
        else:
            self._wait = min(2 * self._wait, self.every)

    def _try_less(self, batch: int, rate: float, loss: Callable[[], Tensor]) -> None:
        kept = [(solver.forward.cycles, solver.adjoint.cycles) for solver in self.solvers]
        add_cycles(self.solvers, -1, -1)
        for solver, (forward, _) in zip(self.solvers, kept):
            solver.forward.cycles = max(solver.forward.cycles, min(forward, fewest(solver)))
        found = self._measure(batch, rate, loss)
        self._wait = FIRST_WAIT
        if found.error > ENOUGH * found.allowed:  # back, and not tried again soon
            for solver, (forward, adjoint) in zip(self.solvers, kept):
                solver.forward.cycles, solver.adjoint.cycles = forward, adjoint
            self._kept = 2 * batch + self.every
            self.gain = self.bias[-2].error / max(self.bias[-2].misfit, 1e-300)

    def _measure(self, batch: int, rate: float, loss: Callable[[], Tensor]) -> GradientBias:
        self._repeats = count_repeats(self.solvers)
        own = measure_bias(self.network, loss)
        has_diverged = self._look()
        (error,) = largest(self.team, DIVERGED if has_diverged or not own < DIVERGED else own)
        misfit = sum(self._misfits)
        if misfit > 0 and error < DIVERGED:
            self.gain = error / misfit
        self.bias.append(GradientBias(batch, error, self.cycles, rate, misfit, self.allowed(batch)))
        return self.bias[-1]

    def _look(self) -> bool:
        """Take the misfits of the last solves; whether one had to be repeated since they were counted. Collective."""
        has_diverged = count_repeats(self.solvers) > self._repeats
        *found, diverged = largest(self.team, *misfits(self.solvers), float(has_diverged))
        self._misfits = found[0], found[1]
        return diverged > 0

    def _add_cycle(self) -> bool:
        """A cycle more, where the misfit is the larger one, or both; False where layers now go one after the other.

        There are never more adjoint ones than forward ones: the adjoint at wrong states is wrong, however well solved.
        """
        forward, adjoint = self._misfits
        adds_forward = forward >= adjoint / 3
        adds_adjoint = adjoint >= forward / 3 and self.cycles[1] < self.cycles[0] + adds_forward
        add_cycles(self.solvers, int(adds_forward or not adds_adjoint), int(adds_adjoint))
        self._wait = FIRST_WAIT
        if not pays(self.solvers, self.team):
            why = "fewer cycles diverge, " if self.bias[-1].error == DIVERGED else ""
            self._go_serial(f"{why}{self.cycles[0]} and {self.cycles[1]} cycles cost as much")
        return not self.why_serial

    def _go_serial(self, why: str) -> None:
        ranks = self.solvers[0].grid.mpi.size
        self.why_serial = f"{why} on {ranks} rank" + "s" * (ranks > 1)
        for solver in self.solvers:
            solver.is_serial = True

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the control goes on from, as JSON values."""
        return {
            "cycles": [(each.forward.cycles, each.adjoint.cycles) for each in self.solvers],
            "bias": [asdict(each) for each in self.bias],
            "accumulated": self.accumulated,
            "why_serial": self.why_serial,
            "rest": [self.gain, self._wait, self._is_due, self._kept],
        }

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.bias = [GradientBias(**each | {"cycles": tuple(each["cycles"])}) for each in state["bias"]]
        self.accumulated, self.why_serial = state["accumulated"], state["why_serial"]
        self.gain, self._wait, self._is_due, self._kept = state["rest"]
        for solver, (forward, adjoint) in zip(self.solvers, state["cycles"]):
            solver.forward.cycles, solver.adjoint.cycles = forward, adjoint
            solver.is_serial = bool(self.why_serial)


# -- what solvers have left, and cost ----------------------------------------------------------------------


def misfits(solvers: Sequence[LayerMgrit]) -> tuple[float, float]:
    """Forward and adjoint ones of the last solves, the largest of all solvers."""
    forward, adjoint = zip(*(solver.misfits for solver in solvers))
    return max(forward), max(adjoint)


def add_cycles(solvers: Sequence[LayerMgrit], forward: int, adjoint: int) -> None:
    """So many cycles more, or less, of each."""
    for solver in solvers:
        solver.forward.cycles = max(solver.forward.cycles + forward, 0)
        solver.adjoint.cycles = max(solver.adjoint.cycles + adjoint, 0)


def fewest(solver: LayerMgrit) -> int:
    """Forward cycles that are kept: where long steps are fitted, one, without which errors grow unseen by misfits."""
    return int(solver.fit is not None)


def can_do_with_less(solvers: Sequence[LayerMgrit]) -> bool:
    """Whether there are cycles that may be taken away."""
    return any(solver.forward.cycles > fewest(solver) or solver.adjoint.cycles > 0 for solver in solvers)


def count_repeats(solvers: Sequence[LayerMgrit]) -> int:
    """Solves that diverged so far, and were repeated one step after the other."""
    return sum(solver.repeats for solver in solvers)


def largest(team: Any, *numbers: float) -> list[float]:
    """The largest of all ranks, each; so they choose alike, whatever their samples. Collective."""
    if team.size == 1:
        return list(numbers)
    found = np.empty(len(numbers))
    team.Allreduce(np.array(numbers), found, MPI.MAX)
    return list(map(float, found))


def pays(solvers: Sequence[LayerMgrit], team: Any) -> bool:
    """Whether cycles have less to do, on the rank that has most, than one layer after the other. Collective."""
    is_dear = any(mgrit_cost(solver) >= serial_cost(solver) for solver in solvers)
    return largest(team, float(is_dear)) == [0.0]
