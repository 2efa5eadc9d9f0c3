"""Poisson's equation: Krylov iterations of the KKT system over mesh and weight, and active sets of sparse controls.

python -m problems.benchmarks.poisson -sizes 16,32,64,128,256 -json poisson_benchmark.json
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import sections
from problems.poisson import PoissonCase, PoissonSettings
from problems.shared.command_line import command_line, start

ALPHAS = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)

#: Relative tolerance of the KKT solves.
RTOL = 1e-8


@dataclass(frozen=True)
class PoissonBenchmark(po.Settings):
    """What is measured."""

    sizes: str = po.setting("16,32,64,128", "elements along a side, separated by commas")
    json: str = po.setting("", "write the rows to this file")


def counts(n: int, alpha: float, solver: str) -> dict[str, Any]:
    """One Newton step from zero by `wathen`, with this `-step_pc_type`: Krylov iterations and CPU s.

    Toward the waves: the sine is an eigenfunction, for which one iteration does.
    """
    PETSc.Options()["step_pc_type"] = solver
    poisson = PoissonCase(PoissonSettings(n=n, alpha=alpha, target="waves"))
    begin = time.process_time()
    result = po.solve(poisson.problem, method="newton", precond="wathen", kkt_rtol=RTOL)
    seconds = time.process_time() - begin
    PETSc.Options().delValue("step_pc_type")
    words = {"iterations": result.iterations, "krylov": _sum(result), "cpu_s": seconds, "J": result.objective}
    return {"n": n, "alpha": alpha, "solver": solver, **words}


def sets(n: int) -> dict[str, Any]:
    """Active sets of a sparse control within bounds."""
    poisson = PoissonCase(PoissonSettings(n=n, alpha=1e-5, beta=1e-3, target="waves"))
    lower, upper = poisson.bounds(-30.0, 30.0)
    begin = time.process_time()
    result = po.solve(poisson.problem, lower=lower, upper=upper)
    z = poisson.control(result)
    return {
        "n": n,
        "sets": result.iterations,
        "krylov": _sum(result),
        "cpu_s": time.process_time() - begin,
        "J": result.objective,
        "zero": float((z == 0).double().mean()),
        "at_bounds": float((z.abs() == 30).double().mean()),
    }


def _sum(result: po.ControlResult) -> int:
    return sum(result.history["krylov"])


def measure(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """All rows, printed on the way."""
    cases = itertools.product(sizes, ALPHAS, ("lu", "hypre"))
    rows = []
    for row in itertools.chain(itertools.starmap(counts, cases), map(sets, sizes)):
        rows.append(row)
        print(
            "  ".join(f"{name} {value:.3g}" if name != "solver" else value for name, value in row.items()), flush=True
        )
    return rows


OPTIONS = sections(PoissonBenchmark)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the options say."""
    with command_line(argv, __doc__, OPTIONS):
        settings = po.read(PoissonBenchmark)
        rows = measure([int(size) for size in settings.sizes.split(",")])
        if settings.json:
            Path(settings.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    start(main)
