"""What the processes of `problems.benchmarks.kkt` do, one task each.

    python -m problems.benchmarks.kkt_work kkt heat -nx 60 -ny 20 -nt 256 -mgrit_window 16

Problem and solvers are those of the options; the last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign
from pdeopt.core.errors import SolveFailure
from pdeopt.core.settings import read
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.precond.operator import SchurOperator, blocks_of
from pdeopt.precond.schur import PropagatedSchur
from pdeopt.precond.wathen import WathenPC
from pdeopt.steps.linear_mgrit import LinearMgrit
from problems.benchmarks.processes import counted, peak_mb
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings
from problems.heat3d import Heat3dCase, Heat3dSettings
from problems.klein_gordon import KleinGordonCase, KleinGordonSettings

CASES: dict[str, tuple[Any, Any]] = {
    "burgers": (BurgersCase, BurgersSettings),
    "heat": (HeatCase, HeatSettings),
    "heat3d": (Heat3dCase, Heat3dSettings),
    "klein_gordon": (KleinGordonCase, KleinGordonSettings),
}
RTOL = 1e-8
PREFIX = "sqp_kkt_"


def problem_of(name: str, **sizes: Any) -> ControlProblem:
    """The problem of the options, but for some of its sizes."""
    case, settings = CASES[name]
    return case(replace(read(settings), **sizes)).problem


class System:
    """The KKT system at the zero start, its right-hand sides, and a solver set up for it.

    Args:
        problem: the control problem.
        hessian, precond: of `KKTSolver`.
    """

    def __init__(self, problem: ControlProblem, hessian: str, precond: str = "wathen") -> None:
        self.problem = problem
        design = problem.create_design()
        lin = problem.at(problem.join(problem.constant_state(design), design))
        self.newton = problem.layout.join_kkt(lin.gradient, lin.residual, problem.create_kkt())
        problem.grid.mpi.Barrier()
        begin = time.process_time()
        self.solver = KKTSolver(RieszMetric(problem), hessian, "sqp_", precond)  # type: ignore[arg-type]
        self.solver.set_point(lin)
        self.ksp = self.solver.ksp
        self.ksp.setTolerances(rtol=RTOL, max_it=PETSc.Options().getInt("cap", 500))
        self.ksp.setUp()
        self.setup_seconds = self._latest(begin)

    def random(self) -> PETSc.Vec:
        """A random multiplier residual, the same on any number of ranks."""
        grid, c = self.problem.grid, self.problem.create_multiplier()
        steps = [np.random.default_rng([1, step]) for step in range(grid.begin, grid.end)]
        assign(c, torch.from_numpy(np.stack([step.standard_normal(self.problem.n) for step in steps])))
        return self.problem.layout.join_kkt(self.problem.create_primal(), c, self.problem.create_kkt())

    def solve(self, rhs: PETSc.Vec) -> dict[str, float]:
        """Iterations, CPU seconds of the busiest rank, and the true residual in the Euclidean and the dual norm."""
        found, remainder = rhs.duplicate(), rhs.duplicate()
        self.problem.grid.mpi.Barrier()
        begin = time.process_time()
        with (
            counted(PropagatedSchur, "apply") as applications,
            counted(SchurOperator, "mult") as products,
            counted(LinearMgrit, "_cycle") as sweeps,
            counted(LinearMgrit, "_size") as sizes,
        ):
            self.ksp.solve(rhs, found)
        seconds = self._latest(begin)
        self.solver.operator.mult(None, found, remainder)
        remainder.aypx(-1.0, rhs)
        return {
            "iterations": getattr(self.ksp.getPC().getPythonContext(), "iterations", self.ksp.getIterationNumber()),
            "cycles": sizes[0] / sweeps[0] - 2 if sweeps[0] else 0,
            "converged": self.ksp.getConvergedReason() > 0,
            "applications": applications[0],
            "products": products[0],
            "seconds": seconds,
            "residual": remainder.norm() / rhs.norm(),
            "dual_residual": self.solver.norm(remainder) / self.solver.norm(rhs),
        }

    @property
    def inner_kind(self) -> str:
        """The Krylov method on the Schur complement, if there is one."""
        pc = self.ksp.getPC()
        context = pc.getPythonContext() if pc.getType() == "python" else None
        return str(context.schur_solver.getType()) if isinstance(context, WathenPC) and context.schur_solver else ""

    def _latest(self, begin: float) -> float:
        return float(max(self.problem.grid.mpi.allgather(time.process_time() - begin)))


def kkt(name: str) -> dict[str, Any]:
    """Solves of the first Newton step and of a random multiplier residual, and the memory of all that."""
    database = PETSc.Options()
    hessian, precond = database.getString("hessian", "gauss-newton"), database.getString("precond", "wathen")
    imports = peak_mb()
    problem = problem_of(name)
    base, seconds = peak_mb(), []
    for _ in range(database.getInt("repeat", 1)):
        system = System(problem, hessian, precond)
        newton = system.solve(system.newton)
        seconds.append(system.setup_seconds + newton["seconds"])
        peak = peak_mb()
        if len(seconds) < database.getInt("repeat", 1):
            system.solver.destroy()
    memory = [problem.grid.mpi.allgather(mb) for mb in (imports, base, peak)]
    found = {
        "newton": newton,
        "inner_kind": system.inner_kind,
        "setup_seconds": system.setup_seconds,
        "seconds": statistics.median(seconds),
        "imports_mb": max(memory[0]),
        "base_mb": max(memory[1]),
        "peak_mb": max(memory[2]),
    }
    if not database.hasName("only_newton"):
        found["random"] = system.solve(system.random())
    system.solver.destroy()
    return found


def sqp(name: str) -> dict[str, Any]:
    """The optimization by `-sqp_type`, after a small one to warm up; median seconds, set-up of the problem included.

    CPU seconds are those of the rank that needs most.
    """
    PETSc.Log.begin()
    SQPSolver(problem_of(name, nx=8, nt=8), max_it=3).solve()
    event, runs = PETSc.Log.Event("pdeoptKKTSolve"), []
    for _ in range(PETSc.Options().getInt("repeat", 1)):
        before, begin, cpu = event.getPerfInfo()["count"], time.perf_counter(), time.process_time()
        problem = problem_of(name)
        with counted(PropagatedSchur, "apply") as applications:
            result = SQPSolver(problem).solve()
        runs.append((time.perf_counter() - begin, max(problem.grid.mpi.allgather(time.process_time() - cpu))))
    krylov, solves = sum(result.history["krylov"]), event.getPerfInfo()["count"] - before
    return {
        "seconds": statistics.median(wall for wall, _ in runs),
        "cpu": statistics.median(cpu for _, cpu in runs),
        "iterations": result.iterations,
        "converged": result.converged,
        "krylov": krylov,
        "solves": solves,
        "mean": krylov / max(solves, 1),
        "applications": applications[0],
        "objective": result.objective,
        "unknowns": problem.create_kkt().getSize(),
        "peak_mb": peak_mb(),
    }


class BlockDiagonal:
    """diag(W, S~)^-1 with the matched S~ by substitution over all steps: what MINRES is preconditioned with.

    Args:
        blocks: of the steps.
    """

    def __init__(self, blocks: KKTBlocks) -> None:
        self.blocks, self.schur = blocks, PropagatedSchur("matched", "forward")
        self.schur.factor(blocks)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = the inverse times x."""
        g, c = self.blocks.layout.kkt_fields(x)
        right, left = self._vectors(x.getComm(), c)
        self.schur.apply(pc, right, left)
        self.blocks.layout.pack(y, *self.blocks.inverse(g), self.blocks.layout.rows(left))

    def _vectors(self, comm: PETSc.Comm, c: torch.Tensor) -> tuple[PETSc.Vec, PETSc.Vec]:
        right = PETSc.Vec().createMPI((c.numel(), None), comm=comm)
        assign(right, c)
        return right, right.duplicate()


def minres(name: str) -> dict[str, Any]:
    """MINRES with `BlockDiagonal` until the true relative residual is `RTOL`; the watching is not timed."""
    problem = problem_of(name)
    system = System(problem, "gauss-newton", "none")
    matrix, rhs = system.ksp.getOperators()[0], system.newton
    found, remainder = rhs.duplicate(), rhs.duplicate()

    def solver() -> PETSc.KSP:
        ksp = PETSc.KSP().create(problem.grid.comm)
        ksp.setOperators(matrix)
        ksp.setType("minres")
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(BlockDiagonal(blocks_of(matrix)))
        return ksp

    def converged(ksp: PETSc.KSP, iteration: int, norm: float) -> bool:
        ksp.buildSolution(found)
        matrix.mult(found, remainder)
        remainder.aypx(-1.0, rhs)
        return remainder.norm() <= RTOL * rhs.norm()

    watched = solver()
    watched.setTolerances(max_it=1000)
    watched.setConvergenceTest(converged)
    watched.solve(rhs, found)
    iterations, seconds = watched.getIterationNumber(), []
    for _ in range(PETSc.Options().getInt("repeat", 1)):
        begin, ksp = time.process_time(), solver()
        ksp.setTolerances(rtol=1e-30, atol=1e-100, max_it=iterations)
        ksp.solve(rhs, found)
        seconds.append(time.process_time() - begin)
    matrix.mult(found, remainder)
    remainder.aypx(-1.0, rhs)
    newton = {
        "iterations": iterations,
        "residual": remainder.norm() / rhs.norm(),
        "dual_residual": system.solver.norm(remainder) / system.solver.norm(rhs),
    }
    return {"newton": newton, "seconds": statistics.median(seconds)}


def table(name: str) -> list[list[Any]]:
    """[axis, value, iterations] of the first Newton step along axes `-axes name:a,b;name,name:c,d`; null: failed."""
    database, found = PETSc.Options(), []
    for axis in database.getString("axes").split(";"):
        names, values = axis.split(":")
        before = {option: database.getString(option, "") for option in names.split(",")}
        for value in values.split(","):
            for option in before:
                database.setValue(option, value)
            found.append([names.split(",")[0], value, _iterations(name)])
        for option, text in before.items():
            database.delValue(option)
            if text:
                database.setValue(option, text)
    return found


def _iterations(name: str) -> int | None:
    try:
        system = System(problem_of(name), "gauss-newton")
        found = system.solve(system.newton)
    except (SolveFailure, PETSc.Error):
        return None
    system.solver.destroy()
    return int(found["iterations"]) if found["converged"] else None


TASKS: dict[str, Callable[[str], Any]] = {"kkt": kkt, "sqp": sqp, "minres": minres, "table": table}


def main() -> None:
    """Do the task of the command line and print what it found."""
    torch.set_num_threads(1)
    found = TASKS[sys.argv[1]](sys.argv[2])
    if PETSc.COMM_WORLD.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
