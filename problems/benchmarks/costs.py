"""Seconds of the parts of a KKT solve by small timings, which are what `clocks` needs.

    python -m problems.benchmarks.costs heat -nx 60 -ny 20 -mgrit_window 16

prints them as JSON; under `mpiexec -n 2` those of a message and a sum instead.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc

from pdeopt.core.arrays import copy
from pdeopt.core.options import set_default
from pdeopt.core.settings import read
from pdeopt.precond.matching import matched_shift
from pdeopt.precond.reduced import ReducedHessian
from pdeopt.steps.linear_mgrit import LinearMgrit, LinearMgritSettings, TimeSystem
from pdeopt.steps.sparse import combination
from problems.benchmarks.kkt_work import PREFIX, System, problem_of

#: Windows of the two problems of which the costs are made.
WINDOWS = (2, 16)


def medians(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU seconds of each function, called in turn: each finds the caches as the others left them."""
    rounds = PETSc.Options().getInt("rounds", 25)
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            found[name].append(time.process_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def parts(name: str) -> dict[str, Any]:
    """Seconds (a call, a row) of each part, see `clocks.Costs`, and n; "alone" is substitution over all steps."""
    set_default(f"{PREFIX}wathen_ksp_type", "preonly")  # the preconditioner without its Schur complement
    set_default(f"{PREFIX}wathen_pc_type", "none")
    window, found = read(LinearMgritSettings).window, {}
    timings = [Timings(name, windows * window) for windows in WINDOWS]
    few, many = (timing.seconds() for timing in timings)
    for part in few:
        rows = [windows if part == "coarse" else windows * window for windows in WINDOWS]
        slope = max(many[part] - few[part], 0.0) / (rows[1] - rows[0])
        found[part] = max(few[part] - slope * rows[0], 0.0), slope
    return {"parts": found, "n": timings[0].blocks.n}


class Timings:
    """The parts for one number of steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.system = System(problem_of(name, nt=steps), "gauss-newton")
        self.blocks = blocks = self.system.ksp.getPC().getPythonContext().blocks
        self.rows = torch.randn(steps, blocks.n, dtype=torch.float64)
        A = combination([(1.0, blocks.A), (1.0, matched_shift(blocks))])
        self.levels = LinearMgrit(blocks.grid, A, blocks.B, read(LinearMgritSettings))
        self.serial = TimeSystem(blocks.grid, A, blocks.B)
        self.reduced = ReducedHessian(self.system.solver.operator)

    def seconds(self) -> dict[str, float]:
        """Of each part."""
        blocks, rows, fine, coarse = self.blocks, self.rows, self.levels.system, self.levels.coarse
        assert coarse is not None  # there are several windows
        matrix, pc = self.system.ksp.getOperators()[0], self.system.ksp.getPC()
        ends, k, out = rows[fine.windows.ends], self.system.newton, self.system.newton.duplicate()
        design = self.reduced.operator.problem.create_design()
        design.set(1.0)
        product, elimination = design.duplicate(), self.reduced.elimination
        found = medians(
            {
                "couple": lambda: rows - fine.couple(ends),
                "coarse": lambda: coarse.system.A(ends),
                "multiply": lambda: blocks.state.multiply(rows),
                "blocks": lambda: pc.apply(k, out),
                "schur": lambda: blocks.schur(rows),
                "operator": lambda: matrix.mult(k, out),
                "vector": lambda: out.axpy(1e-3, k),
                "sweep": lambda: fine.sweep_adjoint(fine.sweep(rows)),
                "design": lambda: self.reduced.mult(None, design, product),
                "design sweeps": lambda: elimination.multiplier(elimination.state(copy(design))),
                "alone": lambda: self.serial.sweep_adjoint(self.serial.sweep(rows)),
            }
        )
        self.system.solver.destroy()
        found["design"] = max(found["design"] - found.pop("design sweeps"), 0.0)  # what is no sweep
        return found | {part: found[part] / 2 for part in ("sweep", "alone")}  # of both directions


def network(name: str) -> dict[str, float]:
    """Seconds of a row from rank to rank, and of a sum over all divided by the levels of its tree. Collective."""
    grid = problem_of(name, nt=2 * PETSc.COMM_WORLD.size).grid
    row, one = torch.zeros(grid.n_local, problem_of(name).n, dtype=torch.float64), np.zeros(1)

    def mean(function: Callable[[], Any], calls: int = 1000) -> float:
        grid.mpi.Barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - begin) / calls

    return {
        "message": mean(lambda: grid.shift(row)),
        "reduction": mean(lambda: grid.mpi.Allreduce(one.copy(), one)) / np.log2(grid.mpi.size),
    }


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    found = (parts if PETSc.COMM_WORLD.size == 1 else network)(sys.argv[1])
    if PETSc.COMM_WORLD.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
