"""Burgers control: time to optimality 1e-8 and peak memory against what a user would do otherwise.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.burgers -json build/burgers_benchmark.json

Every (solver, size) runs in a process of its own on one thread: a small warm-up solve, then the median of
the repetitions, then its peak memory. All processes run one after the other, so ratios are of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from problems.benchmarks.processes import median_seconds

OURS = {
    "newton": "pdeopt Newton-KKT",
    "sqp": "pdeopt inexact SQP",
    "tao_lmvm": "pdeopt TAO lmvm",
    "tao_nls": "pdeopt TAO nls",
}
THEIRS = {
    "scipy_lbfgsb": "",
    "scipy_lbfgsb_tuned": "",
    "scipy_trust_ncg": "",
    "pyrol": "pyrol",
    "casadi_ipopt": "casadi",
}
SIZES = (32, 64, 128, 256)
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    measured: float
    unit: str
    bar: str = ""
    met: bool | None = None


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-sizes", type=int, nargs="+", default=SIZES, help="nx = nt of the comparison")
    parser.add_argument("-repeat", type=int, default=3, help="repetitions, of which the median counts")
    parser.add_argument("-worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        print(json.dumps(work(*options.worker)))
        return []
    rows = [*comparison(options.sizes, options.repeat), *growth(options.repeat), sweep(options.repeat)]
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return rows


def comparison(sizes: list[int], repeat: int) -> list[Row]:
    """Time and memory of every solver at every size, at the default and at a small control weight."""
    rows, seconds = [], {}
    for n, alpha in [*((n, 0.05) for n in sizes), (128, 1e-3)]:
        for solver in [*OURS, *(name for name, package in THEIRS.items() if not package or find_spec(package))]:
            found = measure(solver, n, n, alpha, repeat)
            name, case = found["name"], f"nx = nt = {n}, alpha {alpha:g}"
            seconds[solver, n, alpha] = found["seconds"]
            note = f"{name}, {case} ({found['iterations']} its, optimality {found['optimality']:.0e})"
            rows.append(show(Row(note, found["seconds"], "s")))
            rows.append(show(Row(f"{name}, {case}", found["peak_mb"], "MB peak")))
    for alpha in (0.05, 1e-3):
        for rival in ("scipy_lbfgsb", "scipy_lbfgsb_tuned"):
            if ("newton", 128, alpha) in seconds:
                best = min(seconds[ours, 128, alpha] for ours in ("newton", "sqp"))
                rows.append(
                    bar(
                        f"{rival} / better of Newton, SQP; 128, alpha {alpha:g}",
                        seconds[rival, 128, alpha] / best,
                        "x",
                        5,
                    )
                )
    return rows


def growth(repeat: int) -> list[Row]:
    """Cost per unknown at nx = 64 as the number of steps grows."""
    cost, rows = {}, []
    for steps in (256, 1024, 4096):
        found = measure("newton", 64, steps, 0.05, repeat)
        cost[steps] = found["seconds"] / (steps * (63 + 65 + 63))
        rows.append(
            show(Row(f"Newton-KKT, nx 64, nt {steps} ({found['iterations']} its)", 1e6 * cost[steps], "us per unknown"))
        )
        rows.append(show(Row(f"Newton-KKT, nx 64, nt {steps}", found["peak_mb"], "MB peak")))
    return [*rows, bar("cost per unknown, nx 64, nt 4096 against 256", cost[4096] / cost[256], "x", 1.3, at_most=True)]


def sweep(repeat: int) -> Row:
    """One batched residual and Jacobian-vector product over 4096 steps against a loop over the steps."""
    found = measure("sweep", 64, 4096, 0.05, repeat)
    return bar("residual and Jacobian-vector product, 4096 steps: loop / batched", found["seconds"], "x", 20)


def measure(solver: str, nx: int, nt: int, alpha: float, repeat: int) -> dict[str, Any]:
    """`work` in a process of its own, on one thread."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else "problems.benchmarks.burgers", "-worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    arguments = [solver, str(nx), str(nt), repr(alpha), str(repeat)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{solver} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(solver: str, nx: str, nt: str, alpha: str, repeat: str) -> dict[str, Any]:
    """Run one solver in this process; median seconds, its result, and the peak memory."""
    if solver == "sweep":
        return {"seconds": sweep_ratio(int(nx), int(nt), int(repeat))}
    run = our_solver(solver) if solver in OURS else rival(solver)
    run(8, 8, float(alpha))  # imports and first-call costs of the libraries
    results = [run(int(nx), int(nt), float(alpha)) for _ in range(int(repeat))]
    return {
        **results[-1],
        "seconds": statistics.median(result["seconds"] for result in results),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def our_solver(name: str) -> Callable[[int, int, float], dict[str, Any]]:
    """Problem set-up and solve by pdeopt, as a function of nx, nt and alpha."""
    from petsc4py import PETSc

    from pdeopt.control.reduced import ReducedObjective
    from pdeopt.optimize.fullspace.sqp import SQPSolver
    from pdeopt.optimize.tao import TaoSolver
    from problems.burgers import BurgersCase, BurgersSettings

    if name.startswith("tao_"):
        PETSc.Options().setValue("tao_type", name.removeprefix("tao_"))

    def run(nx: int, nt: int, alpha: float) -> dict[str, Any]:
        begin = time.perf_counter()
        problem = BurgersCase(BurgersSettings(nx=nx, nt=nt, alpha=alpha)).problem
        if name.startswith("tao_"):
            solver = TaoSolver(ReducedObjective(problem), opt_tol=TOLERANCE)
            result = solver.solve()
        else:
            kind = "newton" if name == "newton" else "composite"
            result = SQPSolver(problem, type=kind, opt_tol=TOLERANCE, feas_tol=TOLERANCE).solve()
        seconds = time.perf_counter() - begin
        return {
            "name": OURS[name],
            "seconds": seconds,
            "iterations": result.iterations,
            "optimality": result.history[-1].optimality,
            "objective": result.objective,
        }

    return run


def rival(name: str) -> Callable[[int, int, float], dict[str, Any]]:
    """A solver of `rivals` as a function of nx, nt and alpha."""
    from problems.benchmarks.rivals import RIVALS

    def run(nx: int, nt: int, alpha: float) -> dict[str, Any]:
        found = RIVALS[name](nx, nt, TOLERANCE, alpha=alpha)
        return {
            "name": found.name,
            "seconds": found.wall_time_s,
            "iterations": found.iterations,
            "optimality": found.optimality,
            "objective": found.objective,
        }

    return run


def sweep_ratio(nx: int, nt: int, repeat: int) -> float:
    """Seconds of a Python loop over the steps / seconds of one batched call; same numbers."""
    import torch

    from pdeopt.core.autodiff import jvp
    from problems.burgers import BurgersCase, BurgersSettings

    case = BurgersCase(BurgersSettings(nx=nx, nt=nt))
    constraint, steps = case.problem.constraint, case.problem.grid.steps
    point = tuple(torch.randn(nt, k, dtype=torch.float64) for k in (nx - 1, nx - 1, nx + 1))
    direction = tuple(torch.randn_like(x) for x in point)

    def product(rows: slice) -> Any:
        def residual(*x: Any) -> Any:
            return constraint.residual(*x, steps[rows])

        return jvp(residual, tuple(x[rows] for x in point), tuple(d[rows] for d in direction))

    def loop() -> Any:
        return torch.cat([product(slice(i, i + 1)) for i in range(nt)])

    def batched() -> Any:
        return product(slice(0, nt))

    assert torch.allclose(loop(), batched())
    return median_seconds(loop, repeat) / median_seconds(batched, 5 * repeat)


def bar(case: str, measured: float, unit: str, limit: float, at_most: bool = False) -> Row:
    """A row that is judged."""
    met = measured <= limit if at_most else measured >= limit
    return show(Row(case, measured, unit, f"{'<=' if at_most else '>='} {limit:g}", met))


def show(row: Row) -> Row:
    """Print a row as soon as it is known."""
    verdict = "" if row.met is None else ("met" if row.met else "MISSED")
    print(f"{row.case:78s} {row.measured:10.4g} {row.unit:15s} {row.bar:8s} {verdict}", flush=True)
    return row


if __name__ == "__main__":
    main()
