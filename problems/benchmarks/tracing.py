"""What the ranks of a real run do, in order: step solves and messages. The same can be played with other costs.

    mpiexec -n 4 python -m problems.benchmarks.tracing -nx 4 -ny 3 -nt 64 -layouts "4,2,20" -trace trace.json

solves a small heat problem and writes the traces of the ranks.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import pdeopt.steps.linear_mgrit
from pdeopt.core.arrays import Array
from pdeopt.core.settings import read
from pdeopt.precond.operator import SchurOperator, blocks_of
from pdeopt.precond.reduced import ReducedPC
from pdeopt.precond.schur import PropagatedSchur
from pdeopt.steps.linear_mgrit import LinearMgrit, LinearMgritSettings
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sweeps import substitution
from problems.benchmarks.clocks import Costs, Inner
from problems.benchmarks.kkt_work import System
from problems.benchmarks.processes import counted
from problems.heat import HeatCase, HeatSettings

#: ("solve", 1, rows), ("send", rank, 1) or ("receive", rank, 1); ranks are those of the world.
Event = tuple[str, int, int]

#: Events of PETSc that are a sum over ranks.
SUMS = ("VecDot", "VecTDot", "VecMDot", "VecMTDot", "VecNorm")


class TracedComm(MPI.Intracomm):
    """A communicator that writes down its messages."""

    __module__ = "mpi4py.MPI"  # petsc4py looks whether it is one of these
    events: list[Event]

    @classmethod
    def of(cls, comm: MPI.Intracomm, events: list[Event]) -> TracedComm:
        traced = cls(comm)
        traced.events = events
        traced.world = MPI.Group.Translate_ranks(comm.group, range(comm.size), MPI.COMM_WORLD.group)
        return traced

    def Split(self, color: int = 0, key: int = 0) -> MPI.Intracomm:
        part = super().Split(color, key)
        return part if part == MPI.COMM_NULL else self.of(part, self.events)

    def Send(self, buffer: Any, dest: int, tag: int = 0) -> None:
        self.events.append(("send", self.world[dest], 1))
        super().Send(buffer, dest, tag)

    def Isend(self, buffer: Any, dest: int, tag: int = 0) -> MPI.Request:
        self.events.append(("send", self.world[dest], 1))
        return super().Isend(buffer, dest, tag)

    def Recv(self, buffer: Any, source: int = MPI.ANY_SOURCE, *words: Any) -> None:
        super().Recv(buffer, source, *words)
        self.events.append(("receive", self.world[source], 1))


class TracedSweeps:
    """Windows of steps that write down when they are solved."""

    def __init__(self, events: list[Event], A: StepMatrix, B: StepMatrix, batch: int, starts: Array) -> None:
        self.sweeps, self.events = substitution(A, B, batch, starts), events

    def forward(self, rows: Tensor) -> Tensor:
        self.events.append(("solve", 1, len(rows)))
        return self.sweeps.forward(rows)

    def backward(self, rows: Tensor) -> Tensor:
        self.events.append(("solve", 1, len(rows)))
        return self.sweeps.backward(rows)


@contextmanager
def tracing() -> Iterator[TracedComm]:
    """The world as a communicator; what time grids on it do inside the block is in its `events`."""
    comm = TracedComm.of(MPI.COMM_WORLD, [])
    pdeopt.steps.linear_mgrit.substitution = partial(TracedSweeps, comm.events)
    try:
        yield comm
    finally:
        pdeopt.steps.linear_mgrit.substitution = substitution


def play(traces: Sequence[Sequence[Event]], costs: Costs) -> list[float]:
    """When each rank is done, if its step solves and messages cost this much."""
    time, place = [0.0] * len(traces), [0] * len(traces)
    sent: dict[tuple[int, int], deque[float]] = defaultdict(deque)
    a, b = costs.parts["sweep"]
    while any(at < len(trace) for at, trace in zip(place, traces)):
        before = list(place)
        for rank, trace in enumerate(traces):
            while place[rank] < len(trace):
                what, number, rows = trace[place[rank]]
                if what == "solve":
                    time[rank] += number * a + rows * b
                elif what == "send":
                    sent[rank, number].append(time[rank])
                elif not sent[number, rank]:
                    break  # it waits
                else:
                    time[rank] = max(time[rank], sent[number, rank].popleft() + costs.message)
                place[rank] += 1
        assert place != before, "the ranks wait for one another"
    return time


def sums_so_far() -> int:
    """Sums over ranks in PETSc's vectors, since `PETSc.Log.begin`."""
    return sum(PETSc.Log.Event(name).getPerfInfo()["count"] for name in SUMS)


def trace_heat(comm: TracedComm) -> dict[str, Any]:
    """What is done by one application of the approximate Schur complement, and by a KKT solve. Collective.

    Returns the events of each rank for both; of the solve also PETSc's sums over ranks, on each rank, its
    iterations, and what is done in each with the Schur complement.
    """
    system = System(HeatCase(read(HeatSettings), comm).problem, "gauss-newton")
    system.ksp.setTolerances(rtol=1e-4)
    blocks, solution = blocks_of(system.ksp.getOperators()[0]), system.newton.duplicate()
    assert blocks is not None  # every rank has steps
    schur, lam = PropagatedSchur("matched", "mgrit", read(LinearMgritSettings)), system.problem.create_multiplier()
    schur.factor(blocks)
    system.ksp.solve(system.newton, solution)  # what is made once is there now
    PETSc.Log.begin()
    comm.events.clear()
    schur.apply(None, lam, lam.duplicate())
    propagator = comm.gather(list(comm.events))
    comm.events.clear()
    before = sums_so_far()
    with counted(PropagatedSchur, "apply") as applications, counted(SchurOperator, "mult") as products:
        system.ksp.solve(system.newton, solution)
    reductions, kkt = comm.gather(sums_so_far() - before), comm.gather(list(comm.events))
    iterations, kind = system.ksp.getIterationNumber(), system.inner_kind
    system.solver.destroy()
    inner = Inner(kind, applications[0] // iterations, products[0] // iterations)
    return {
        "propagator": propagator,
        "kkt": kkt,
        "reductions": reductions,
        "iterations": iterations,
        "inner": asdict(inner),
    }


def trace_reduced(comm: TracedComm) -> dict[str, Any]:
    """What is done by a KKT solve on the reduced Hessian with sweeps by MGRIT cycles. Collective.

    Returns the events of each rank, the iterations, and the cycles of each sweep.
    """
    problem = HeatCase(read(HeatSettings), comm).problem
    system, cycles = System(problem, "gauss-newton", "reduced"), list[int]()
    system.ksp.setTolerances(rtol=1e-2)
    solve = LinearMgrit._cycle

    def counting(mgrit: LinearMgrit, *args: Any) -> Tensor:
        with counted(LinearMgrit, "_size") as sizes:
            found = solve(mgrit, *args)
        cycles.append(sizes[0] - 2)  # of the right-hand side, and of each residual
        return found

    solution = system.newton.duplicate()
    system.ksp.solve(system.newton, solution)
    comm.events.clear()
    with patch.object(LinearMgrit, "_cycle", counting):
        system.ksp.solve(system.newton, solution)
    events, context = comm.gather(list(comm.events)), system.ksp.getPC().getPythonContext()
    assert isinstance(context, ReducedPC)
    iterations = context.iterations
    system.solver.destroy()
    return {"kkt": events, "iterations": iterations, "cycles": cycles}


def main() -> None:
    """Trace the problem of the options for each of the layouts, `-layouts window,cycles,levels;...`."""
    torch.set_num_threads(1)
    database, found = PETSc.Options(), {}
    for layout in database.getString("layouts", "16,2,20").split(";"):
        for name, value in zip(("window", "cycles", "levels"), layout.split(",")):
            database.setValue(f"mgrit_{name}", value)
        for name in ("propagator", "wathen_propagator"):
            database.setValue(name, "mgrit")
        with tracing() as comm:
            found[layout] = trace_heat(comm) | {"reduced": trace_reduced(comm)}
    if MPI.COMM_WORLD.size % 2 == 0:  # two ranks a step, the last of the layouts
        database.setValue("space_ranks", 2)
        with tracing() as comm:
            found[f"{layout} x 2"] = trace_heat(comm)
    if MPI.COMM_WORLD.rank == 0:
        Path(database.getString("trace")).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
