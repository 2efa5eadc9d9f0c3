"""SPQN on the control of Burgers' equation, windows of time as its parts, against TAO's limited-memory method.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.schwarz -json build/schwarz.json

Everything counts, in gradients of all time steps: state and adjoint solves of windows by their part of the steps, those
of the coarse space, controls constant on 8 windows, by theirs. All stop at a gradient of 1e-8 in the dual norm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.reduced import ReducedObjective
from pdeopt.optimize.coarse_time import with_coarse_space
from pdeopt.optimize.descent.minimizer import Minimizer
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN
from pdeopt.optimize.tao import TaoSolver
from problems.benchmarks.processes import Row, bar, measure, table
from problems.burgers import BurgersCase, BurgersSettings

#: Variants by name: class and settings.
VARIANTS: dict[str, tuple[type[Minimizer], dict[str, Any]]] = {
    "SPQN, coarse space": (SPQN, {"local_it": 0, "memory": 50, "coarse_rtol": 1e-3}),
    "SPQN, coarse space, one sweep": (SPQN, {"local_it": 2, "memory": 50, "coarse_rtol": 1e-3, "every": 1000}),
    "SPQN, coarse space and windows": (SPQN, {"local_it": 2, "memory": 50, "coarse_rtol": 1e-3}),
    "SPQN, windows alone": (SPQN, {"local_it": 2, "memory": 50, "coarse_it": 0}),
    "L-BFGS, 10 pairs": (LBFGS, {}),
    "dense": (SSBroyden, {}),
}


class Benchmark:
    """The cases; small ones with `-quick`."""

    def __init__(self, quick: bool = False) -> None:
        self.size = 32 if quick else 64

    def burgers(self) -> list[Row]:
        """The default problem, and a smaller control weight."""
        return [row for alpha in (0.05, 1e-3) for row in self._compare(alpha)]

    def _compare(self, alpha: float) -> list[Row]:
        problem = BurgersCase(BurgersSettings(nx=self.size, nt=2 * self.size, alpha=alpha)).problem
        reduced = ReducedObjective(problem)
        tao = TaoSolver(reduced).solve()
        calls = reduced.tally.gradients
        lines: dict[str, list[float]] = {"TAO lmvm": [tao.iterations, calls, calls, tao.objective]}
        metric = RieszMetric(problem)
        for name, (method, words) in VARIANTS.items():
            function = with_coarse_space(ReducedObjective(problem))
            whole = function.functions[0]
            gradient = PETSc.Vec().createMPI((whole.size, None), comm=problem.grid.comm)

            def done(minimizer: Any, scale: Any = whole.scale, gradient: Any = gradient) -> bool:
                gradient.array[:] = (minimizer.g * scale).numpy()
                return metric.design_dual_norm(gradient) <= 1e-8

            start = torch.zeros(whole.size, dtype=torch.float64)
            last = method(function, gtol=1e-12, max_it=500, **words).minimize(start, until=done).history[-1]
            lines[name] = [last.iteration, last.gradients, last.work, last.objective]
        table(
            f"alpha {alpha:g}, nx {self.size}, nt {2 * self.size}", ["iterations", "calls", "work", "objective"], lines
        )
        best = min(VARIANTS, key=lambda name: lines[name][2])
        return [
            bar(
                f"alpha {alpha:g}: work of SPQN with its coarse space / gradients of TAO lmvm",
                lines["SPQN, coarse space"][2] / calls,
                "x",
                0.5,
            ),
            bar(
                f"alpha {alpha:g}: relative difference of the optimal values, best ({best})",
                abs(lines[best][3] / tao.objective - 1.0),
                "",
                1e-9,
            ),
        ]


CASES = {"burgers": Benchmark.burgers}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure and print the rows of the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-quick", action="store_true", help="small cases, to see that all runs")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="cases")
    parser.add_argument("-json", default="", help="write the rows to this file")
    options = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.quick), options.json)


if __name__ == "__main__":
    main()
