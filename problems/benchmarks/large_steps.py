"""Large steps: the heat equation in a cube, solved for inside a step by multigrid in space.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.large_steps -json build/large_steps.json

Seven-point differences on n^3 points inside (0, 1)^3, u = 0 at the boundary, a source at each point as the control.
Each run is a process of its own, `-run n nt alpha way`, under mpiexec for several ranks. Seconds are CPU seconds of a
rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.steps import StepCounter
from problems.benchmarks.kkt import spread
from problems.benchmarks.processes import Row, bar, measure, peak_mb, plain, run
from problems.heat import Heat

#: Options of the ways to solve the KKT system.
WAYS = {
    "wathen": {"sqp_kkt_precond": "wathen"},
    "reduced": {"sqp_kkt_precond": "reduced"},
    "reduced, exact": {"sqp_kkt_precond": "reduced", "sqp_kkt_reduced_ksp_type": "cg", "step_ksp_rtol": "1e-12"},
}


def cube(n: int, num_steps: int, alpha: float) -> po.ControlProblem:
    """Tracking of a bump that comes and goes, over one unit of time."""
    h, x = 1 / (n + 1), np.linspace(0, 1, n + 2)[1:-1]
    line = sp.diags([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], [-1, 0, 1]) / h**2
    M = sp.csr_matrix(h**3 * sp.identity(n**3))
    S = sp.csr_matrix(0.05 * h**3 * sp.kronsum(line, sp.kronsum(line, line)))
    X, Y, Z = np.meshgrid(x, x, x, indexing="ij")
    bump = np.sin(np.pi * X) * np.sin(2 * np.pi * Y) * np.exp(-8 * ((X - 0.3) ** 2 + (Z - 0.6) ** 2))
    d = torch.from_numpy(bump.ravel())
    constraint = Heat(M, S, M, M, np.zeros(n**3), theta=1.0)
    tracking = po.Tracking(lambda t: torch.sin(np.pi * t)[:, None] * d, constraint.state_mass)
    grid = po.TimeGrid(np.linspace(0, 1, num_steps + 1))
    return po.ControlProblem(constraint, tracking + po.ControlCost(alpha, constraint.control_mass), grid)


def solve(n: int, num_steps: int, alpha: float, way: str) -> dict[str, Any]:
    """One KKT system of the problem, and what it took on the rank that needs most."""
    options = PETSc.Options()
    for name, value in {"step_pc_type": "hypre", **WAYS[way]}.items():
        options[name] = value
    before, start = peak_mb(), time.process_time()
    result = po.solve(cube(n, num_steps, alpha), method="newton")
    largest = MPI.COMM_WORLD.allreduce([time.process_time() - start, peak_mb(), before], op=_maxima)
    last = result.history[-1]
    return {
        "converged": result.converged,
        "objective": result.objective,
        "optimality": last.optimality,
        "krylov": last.krylov,
        "solves": StepCounter.solves,
        "step_its": StepCounter.iterations,
        **dict(zip(("cpu", "mb", "base_mb"), largest)),
    }


def _maxima(left: list[float], right: list[float]) -> list[float]:
    return [max(pair) for pair in zip(left, right)]


def once(n: int, num_steps: int, alpha: float, way: str, ranks: int = 1) -> dict[str, Any]:
    """`solve` in a process of its own."""
    found: dict[str, Any] = run("problems.benchmarks.large_steps", "-run", n, num_steps, alpha, way, ranks=ranks)
    return found


def refinement(quick: bool) -> list[Row]:
    """Iterations of the KKT system and inside a step on finer meshes."""
    rows, krylov, inside = [], [], []
    for n in (6, 12) if quick else (12, 24, 48):
        one = once(n, 8, 1e-3, "wathen")
        krylov.append(one["krylov"])
        exact = once(n, 8, 1.0, "reduced, exact")
        inside.append(exact["step_its"] / exact["solves"])
        rows.append(plain(f"{n}^3, nt 8, wathen: Krylov iterations", krylov[-1], ""))
        rows.append(plain(f"{n}^3, nt 8: step iterations to 1e-12", inside[-1], "a solve"))
    rows.append(bar("change of Krylov iterations", spread(krylov), "", 2))
    return [*rows, bar("change of step iterations", max(inside) - min(inside), "", 1)]


def inexact(quick: bool) -> list[Row]:
    """Step iterations of reduced conjugate gradients whose step solves are relaxed, against exact ones."""
    n = 8 if quick else 16
    relaxed, exact = once(n, 8, 1e-3, "reduced"), once(n, 8, 1e-3, "reduced, exact")
    case = f"{n}^3, nt 8, alpha 1e-3, reduced"
    return [
        bar(f"{case}: step iterations, relaxed / 1e-12", relaxed["step_its"] / exact["step_its"], "x", 0.7),
        bar(f"{case}: true gradient at the end", relaxed["optimality"], "", 1e-8),
        plain(f"{case}: iterations, relaxed", relaxed["krylov"], ""),
        plain(f"{case}: iterations, exact", exact["krylov"], ""),
    ]


def size(quick: bool) -> list[Row]:
    """Time and memory per unknown, two ranks of two steps each."""
    rows, cost = [], {}
    for n in (8, 12) if quick else (24, 46):
        for way in ("reduced", "wathen"):
            one = once(n, 4, 1e-1, way, ranks=2)
            cost[n, way] = 1e6 * one["cpu"] / (4 * n**3)
            rows.append(plain(f"{n}^3, nt 4, 2 ranks, {way}: CPU time", cost[n, way], "us per unknown and step"))
            above = 1024 * (one["mb"] - one["base_mb"]) / n**3
            rows.append(plain(f"{n}^3, nt 4, 2 ranks, {way}: memory above imports", above, "KiB per unknown of a step"))
    return rows


CASES: dict[str, Callable[[bool], list[Row]]] = {"refinement": refinement, "inexact": inexact, "size": size}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("-run", nargs=4, metavar=("N", "NT", "ALPHA", "WAY"), help="one run, as JSON")
    options = parser.parse_args(argv)
    if options.run:
        n, num_steps, alpha, way = options.run
        found = solve(int(n), int(num_steps), float(alpha), way)
        if MPI.COMM_WORLD.rank == 0:
            sys.stdout.write(json.dumps(found) + "\n")
        return []
    return measure(CASES, options.only, options.quick, options.json)


if __name__ == "__main__":
    main()
