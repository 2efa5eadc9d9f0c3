"""A model of the time that KKT solves take on many ranks: the clock of each rank, run through the algorithm.

The functions repeat the schedule of `pdeopt.steps.linear_mgrit`, of `WathenPC` with a few inner steps under flexible
GMRES, and of `ReducedPC`: who solves how many steps one after the other, who waits for whose message, when all wait for
a sum. They know numbers of steps and ranks alone, and what the parts cost; `tracing` shows that real runs do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from petsc4py import PETSc

from pdeopt.core.arrays import Array

#: Toward later steps, as the state runs, or toward earlier ones, as the adjoint does.
FORWARD, BACKWARD = +1, -1

#: Scalar products in an iteration of conjugate gradients, flexible ones, and in a product with the reduced Hessian.
REDUCED_SUMS = 5

#: Scalar products of PETSc's conjugate gradients that belong to none of their steps.
CG_SUMS = 1 if PETSc.Sys.getVersion() < (3, 26) else 3


@dataclass(frozen=True)
class Layout:
    """Steps on ranks, and the cycles over them; see `LinearMgritSettings`. All numbers must divide one another."""

    steps: int
    ranks: int
    window: int = 16
    cycles: int = 2
    levels: int = 20

    @property
    def serial(self) -> Layout:
        """Substitution over all steps on one rank."""
        return replace(self, ranks=1, levels=1)


@dataclass(frozen=True)
class Costs:
    """Seconds.

    Attributes:
        parts: work on rows of a rank, by name: seconds a call, seconds a row.
        message: of one row, from a rank to the next.
        reduction: of a level in the tree of a sum over all ranks.
    """

    parts: Mapping[str, tuple[float, float]]
    message: float
    reduction: float


@dataclass(frozen=True)
class Inner:
    """Krylov steps on the Schur complement in one application of the preconditioner.

    Attributes:
        kind: of KSP, cg or fgmres.
        applications: of the approximate Schur complement.
        products: with the Schur complement.
    """

    kind: str = "cg"
    applications: int = 2
    products: int = 2

    @property
    def sums(self) -> int:
        """Sums over the ranks: two scalar products a step; GMRES takes a norm before, CG that of each residual, too."""
        if self.kind == "fgmres":
            return 1 + 2 * self.applications
        return self.applications + 2 * self.products + CG_SUMS if self.kind == "cg" else 0


class Clocks:
    """The clock of each rank, and what it has done: sweeps, step solves in them, messages sent, sums taken part in."""

    def __init__(self, layout: Layout, costs: Costs) -> None:
        self.layout, self.costs, self.ranks = layout, costs, np.arange(layout.ranks)
        self.time = np.zeros(layout.ranks)
        self.sweeps, self.solves, self.messages = np.zeros((3, layout.ranks), dtype=int)
        self.reductions = 0

    @property
    def share(self) -> int:
        """Steps of a rank."""
        return self.layout.steps // self.layout.ranks

    def work(self, part: str, rows: int, ranks: Array | None = None, calls: int = 1) -> None:
        """What all ranks do, each for itself."""
        a, b = self.costs.parts[part]
        self.time[self.ranks if ranks is None else ranks] += calls * a + rows * b

    def solve(self, ranks: Array, rows: int) -> None:
        """A sweep through so many steps, one after the other."""
        self.work("sweep", rows, ranks)
        self.sweeps[ranks] += 1
        self.solves[ranks] += rows

    def receive(self, targets: Array, sources: Array, sent: Array) -> None:
        """Wait for the messages that the sources sent at some time."""
        self.time[targets] = np.maximum(self.time[targets], sent + self.costs.message)
        self.messages[sources] += 1

    def shift(self, toward: int, ranks: Array | None = None) -> None:
        """A row to the next of these ranks, as `TimeGrid.shift` and its adjoint send it."""
        order = (self.ranks if ranks is None else ranks)[::toward]
        self.receive(order[1:], order[:-1], self.time[order[:-1]])

    def reduce(self, times: int = 1) -> None:
        """Sums over all ranks."""
        levels = np.ceil(np.log2(len(self.time)))
        self.time[:] = self.time.max() + times * levels * self.costs.reduction
        self.reductions += times


def sweep(clocks: Clocks, ranks: Array, steps: int, window: int, toward: int) -> None:
    """All windows of a level at once; those over several ranks from rank to rank."""
    share = steps // len(ranks)
    chain = ranks.reshape(-1, max(window // share, 1))[:, ::toward]
    for place, now in enumerate(chain.T):
        if place:
            before = chain[:, place - 1]
            clocks.receive(now, before, clocks.time[before])
        clocks.solve(now, share)


def cycles(clocks: Clocks, toward: int, ranks: Array | None = None, steps: int = 0, level: int = 1) -> None:
    """`LinearMgrit.forward` or `adjoint` on a level and all below it; default the finest."""
    layout = clocks.layout
    ranks, steps = (clocks.ranks, layout.steps) if ranks is None else (ranks, steps)
    if level == layout.levels or steps <= layout.window:
        sweep(clocks, ranks, steps, steps, toward)
        return
    sweep(clocks, ranks, steps, layout.window, toward)
    for _ in range(layout.cycles):
        if toward == BACKWARD:
            clocks.shift(BACKWARD, ranks)
        correct(clocks, toward, ranks, steps, level)


def correct(clocks: Clocks, toward: int, ranks: Array, steps: int, level: int) -> None:
    """The coarse correction of what is missed at the ends of windows, and a sweep from there."""
    window, share = clocks.layout.window, steps // len(ranks)
    ends = ranks[max(window // share, 1) - 1 :: max(window // share, 1)]  # they own the coarse steps
    clocks.work("coarse", steps // window // len(ends), ends)
    cycles(clocks, toward, ends, steps // window, level + 1)
    if toward == FORWARD:
        clocks.shift(FORWARD, ranks)
    clocks.work("couple", share, ranks)
    sweep(clocks, ranks, steps, window, toward)


def iterate(clocks: Clocks, toward: int, count: int) -> None:
    """`LinearMgrit.solve` or `solve_adjoint` with so many cycles: after each the residual is measured."""
    layout, ranks = clocks.layout, clocks.ranks
    if layout.levels == 1 or layout.steps <= layout.window:
        sweep(clocks, ranks, layout.steps, layout.steps, toward)
        return
    sweep(clocks, ranks, layout.steps, layout.window, toward)
    clocks.reduce()
    for cycle in range(count + 1):
        clocks.shift(toward)  # what is missed, and its size
        clocks.work("couple", clocks.share)
        clocks.reduce()
        if cycle < count:
            correct(clocks, toward, ranks, layout.steps, 1)


def propagate(clocks: Clocks) -> None:
    """The approximate inverse of the Schur complement, `PropagatedSchur`."""
    cycles(clocks, FORWARD)
    clocks.work("multiply", clocks.share)
    cycles(clocks, BACKWARD)


def precondition(clocks: Clocks, inner: Inner) -> None:
    """`WathenPC` with inner steps on the Schur complement."""
    clocks.work("blocks", clocks.share)
    clocks.shift(FORWARD)
    for _ in range(inner.applications):
        propagate(clocks)
    for _ in range(inner.products):
        clocks.work("schur", clocks.share)
        clocks.shift(BACKWARD)
        clocks.shift(FORWARD)
    clocks.reduce(inner.sums)
    clocks.shift(BACKWARD)


def solve(layout: Layout, costs: Costs, iterations: int, inner: Inner) -> Clocks:
    """A KKT solve by flexible GMRES; classical Gram-Schmidt, done twice, with a norm that asks whether it must."""
    clocks = Clocks(layout, costs)
    clocks.reduce()
    for k in range(iterations):
        precondition(clocks, inner)
        clocks.work("operator", clocks.share)
        clocks.shift(BACKWARD)
        clocks.shift(FORWARD)
        clocks.work("vector", (4 * k + 4) * clocks.share, calls=4 * k + 4)
        clocks.reduce(4)
    return clocks


def reduced(layout: Layout, costs: Costs, iterations: int, cycles_of_sweeps: Iterable[int]) -> Clocks:
    """A KKT solve by conjugate gradients on the reduced Hessian.

    Args:
        layout, costs: where, and what the parts cost.
        iterations: of conjugate gradients.
        cycles_of_sweeps: of each sweep over time, backward and forward in turn: the multiplier of the right-hand side,
            two an iteration, and two of the solution; the states of a zero design at a feasible point need none.
    """
    clocks, toward = Clocks(layout, costs), FORWARD
    clocks.work("design", clocks.share)
    clocks.reduce()
    for number, count in enumerate(cycles_of_sweeps):
        toward = -toward
        if toward == FORWARD:
            clocks.work("design", clocks.share)
        clocks.reduce()  # is there anything to solve for?
        iterate(clocks, toward, count)
        if toward == BACKWARD and 0 < number <= 2 * iterations:
            clocks.reduce(REDUCED_SUMS)
    return clocks


def sequential_solves(layout: Layout) -> int:
    """Step solves that `LinearMgrit.forward` does one after the other, on whatever ranks."""
    clocks = Clocks(layout, Costs({"sweep": (0, 1), "coarse": (0, 0), "couple": (0, 0)}, 0, 0))
    cycles(clocks, FORWARD)
    return int(clocks.time.max())
